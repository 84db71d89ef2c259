"""What a model learns from a window of tokens, one module per objective."""
