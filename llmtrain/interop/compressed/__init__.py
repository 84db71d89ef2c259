"""Quantized weights as compressed-tensors lays them out in Hugging Face folders."""
