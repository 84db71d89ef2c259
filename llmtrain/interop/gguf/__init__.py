"""GGUF, the files of llama.cpp: written and proved there, and read."""
