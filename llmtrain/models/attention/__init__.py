"""Attention: its kinds, kernels, caches, and who sees whom."""
