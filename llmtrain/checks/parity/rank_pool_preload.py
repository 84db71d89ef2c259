"""Imported first by the fork server of llmtrain/checks/parity/rank_pool.py."""

from llmtrain.checks.parity.rank_pool import preload

preload()
