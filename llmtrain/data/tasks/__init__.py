"""Samples of evaluation tasks: read, made into tokens, and measured by what a model says about them."""
