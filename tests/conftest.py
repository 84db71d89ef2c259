import os
import random

from hypothesis import settings

# The same examples in every run: a failure on one machine is a failure on all.
settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")

LAYOUT_SEED_VARIABLE = "LLMTRAIN_LAYOUT_SEED"
"""Environment variable with the seed of tests/parity/test_random_layouts.py; without it there is another in every
session. The processes that share a session's tests inherit it."""

os.environ.setdefault(LAYOUT_SEED_VARIABLE, str(random.SystemRandom().randrange(1_000_000)))


def pytest_report_header() -> str:
    return f"random layouts: {LAYOUT_SEED_VARIABLE}={os.environ[LAYOUT_SEED_VARIABLE]}"
