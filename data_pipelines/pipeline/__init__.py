"""A pipeline at work: chunks, tasks with done-records, the executors that run them, what is said of the result."""
