"""Batch scripts for Slurm, to be used by hand; `llmtrain submit --to slurm` fills in their header (launch/sbatch.py)."""
