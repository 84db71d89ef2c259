"""What a fork server imports first; see llmtrain/checks/parity/rank_pool.py."""

from llmtrain.checks.parity.rank_pool import preload

preload()
