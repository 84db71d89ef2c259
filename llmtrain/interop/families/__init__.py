"""Hugging Face families: a name table each."""
