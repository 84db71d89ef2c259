"""Tests of llmtrain/data/chat."""
