"""The file of evaluation tasks, and the templates in it."""
