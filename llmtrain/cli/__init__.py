"""The `llmtrain` command."""
