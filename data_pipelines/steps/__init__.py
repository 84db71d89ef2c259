"""What happens to one document: the steps of a pipeline that look at nothing else."""
