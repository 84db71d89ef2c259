"""Batch scripts for Slurm, to be used by hand; launch/sbatch.py fills in their header."""
