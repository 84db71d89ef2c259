"""What is done in each stage of a pipeline: tasks that do not look at one another."""
