"""A run read from outside: its state, its efficiency, the report page."""
