"""The `llmtrain` command."""

from llmtrain.cli.app import app, main

__all__ = ["app", "main"]
