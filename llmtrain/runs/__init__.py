"""The run folder and its files, for those who write and those who read them."""
