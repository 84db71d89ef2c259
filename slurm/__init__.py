"""Batch scripts for Slurm, to be used by hand; launch/on_slurm/batch_script.py fills in their header."""
