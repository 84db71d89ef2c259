import os
import random
import signal

from hypothesis import settings

from llmtrain.messages import show_messages

# The same examples in every run: a failure on one machine is a failure on all.
settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")

# What a test calls says what the command would say.
show_messages()

LAYOUT_SEED_VARIABLE = "LLMTRAIN_LAYOUT_SEED"
"""Environment variable with the seed of tests/parity/test_random_layouts.py; without it there is another in every
session. The processes that share a session's tests inherit it."""

# A shell lets what it starts in the background ignore SIGINT, and nohup SIGHUP, and so would all that tests start.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

os.environ.setdefault(LAYOUT_SEED_VARIABLE, str(random.SystemRandom().randrange(1_000_000)))


def pytest_report_header() -> str:
    return f"random layouts: {LAYOUT_SEED_VARIABLE}={os.environ[LAYOUT_SEED_VARIABLE]}"
