"""Ranks as tasks of a Slurm job."""
