"""Objectives: the task that a window of tokens becomes."""
