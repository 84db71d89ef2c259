"""The configuration of a data pipeline."""
