"""Making shards: read, tokenize, split, write, verify."""
