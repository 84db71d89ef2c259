"""Inputs that nobody would write on purpose, or only with a bad one, through the real command."""
