"""When ranks hang, and which of them is the reason."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.rank.signals import HeartbeatBoard, Position
from launch.supervision.hangs import (
    current_place,
    find_suspects,
    is_stuck,
    read_stacks,
    save_stacks,
    stopped_processes,
    waits_for_others,
)
from llmtrain.config.launch import WatchdogConfig

LIMITS = WatchdogConfig(setup_seconds=100, data_seconds=10, step_seconds=20, checkpoint_seconds=50)

IN_COLLECTIVE = """\
Thread 0x00007f0000000001 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 331 in wait

Current thread 0x00007f0000000002 (most recent call first):
  File "/venv/torch/distributed/distributed_c10d.py", line 3001 in all_reduce
  File "/src/llmtrain/engines/torch_engine.py", line 90 in train_step
"""
AT_WORK = """\
Current thread 0x00007f0000000002 (most recent call first):
  File "/src/llmtrain/models/attention/multi_head.py", line 88 in forward
  File "/venv/torch/distributed/distributed_c10d.py", line 3001 in wrapper
"""


def test_late_is_only_who_is_late_in_its_section() -> None:
    step, data = Position("step", 7, since=0.0), Position("data", 7, since=0.0)
    assert not is_stuck([step, step], LIMITS, now=20.0)
    assert is_stuck([step, step], LIMITS, now=20.1)
    assert not is_stuck([data, step], LIMITS, now=15.0)
    assert is_stuck([data, step], LIMITS, now=20.1)


def test_one_that_saves_excuses_those_that_wait_for_it() -> None:
    step, checkpoint = Position("step", 7, since=0.0), Position("checkpoint", 7, since=0.0)
    assert not is_stuck([step, checkpoint], LIMITS, now=49.0)
    assert is_stuck([step, checkpoint], LIMITS, now=51.0)


def at(phase: str, step: int) -> Position:
    return Position(phase, step, since=0.0)  # type: ignore[arg-type]  # the tests name phases


@pytest.mark.parametrize(
    ("positions", "helpless", "stacks", "ranks", "reason"),
    [
        ({0: at("step", 7), 1: at("step", 7)}, {1: "stopped (SIGSTOP)"}, {0: IN_COLLECTIVE}, [1], "SIGSTOP"),
        ({0: at("step", 8), 1: at("step", 7), 2: at("step", 8)}, {}, {}, [1], "fewer steps"),
        ({0: at("step", 7), 1: at("data", 7)}, {}, {}, [1], "wait for it in the step"),
        ({0: at("step", 7), 1: at("step", 7)}, {}, {0: IN_COLLECTIVE, 1: AT_WORK}, [1], "waits for no other rank"),
        ({0: at("step", 7), 1: at("step", 7)}, {}, {0: IN_COLLECTIVE, 1: IN_COLLECTIVE}, [0, 1], "nothing tells"),
        ({0: at("step", 7), 1: at("step", 7)}, {}, {0: IN_COLLECTIVE, 1: ""}, [0, 1], "nothing tells"),
    ],
)
def test_the_reason_is_found(
    positions: dict[int, Position], helpless: dict[int, str], stacks: dict[int, str], ranks: list[int], reason: str
) -> None:
    suspects = find_suspects(positions, helpless, stacks)
    assert [suspect.rank for suspect in suspects] == ranks
    assert all(reason in suspect.reason for suspect in suspects)


def test_a_stack_says_where_its_main_thread_is() -> None:
    assert waits_for_others(IN_COLLECTIVE) and not waits_for_others(AT_WORK)
    assert current_place(IN_COLLECTIVE) == "all_reduce (distributed_c10d.py:3001)"
    assert current_place(AT_WORK) == "forward (multi_head.py:88)"
    assert current_place("") == ""


def test_a_process_in_a_c_call_dumps_its_stack_and_a_stopped_one_is_seen(tmp_path: Path) -> None:
    program = (
        "import sys, threading\nfrom launch.supervision.hangs import dump_on_signal\ndump_on_signal(1)\n"
        "def waits_for_ever():\n    sys.stderr.write('ready')\n    sys.stderr.flush()\n    threading.Lock().acquire()\n"
        "    lock = threading.Lock()\n    lock.acquire()\n    lock.acquire()\nwaits_for_ever()\n"
    )
    line = [sys.executable, "-c", program]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path.cwd()) as process:
        assert process.stdout and process.stderr
        process.stderr.read(5)
        ranks = {3: (process.pid, process.stdout.fileno())}
        stacks = read_stacks(ranks)
        assert current_place(stacks[3]).startswith("waits_for_ever (")
        assert stopped_processes({3: process.pid}) == {}
        os.kill(process.pid, signal.SIGSTOP)
        deadline = time.monotonic() + 10
        while not stopped_processes({3: process.pid}) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert list(stopped_processes({3: process.pid, 4: 2**22 + 1})) == [3]
        assert read_stacks(ranks) == {3: ""}
        process.kill()
    save_stacks({**stacks, 4: ""}, tmp_path)
    saved = (tmp_path / "logs" / "stacks.txt").read_text()
    assert "=== rank 3\n" in saved and "waits_for_ever" in saved and "=== rank 4\nsaid nothing" in saved


def test_a_board_shows_where_forked_ranks_are() -> None:
    board = HeartbeatBoard(2, step=5)
    child = os.fork()
    if child == 0:
        heartbeat = board.heartbeat(1)
        heartbeat("setup", 5)
        heartbeat("checkpoint", 6)
        os._exit(0)
    os.waitpid(child, 0)
    here, there = board.positions()
    assert (here.phase, here.step, here.first_step) == ("setup", 5, 5)
    assert (there.phase, there.step, there.first_step) == ("checkpoint", 6, 5)
    assert here.since <= there.since <= time.monotonic()
