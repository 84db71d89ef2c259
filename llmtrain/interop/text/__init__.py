"""Tokenizers of exports and imports, and the proof that a prompt becomes the same ids."""
