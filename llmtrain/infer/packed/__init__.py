"""Quantized matrices that stay in whole numbers in memory, and are multiplied by PyTorch's kernels for CPUs."""
