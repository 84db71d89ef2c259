"""Probes in processes that break, die or hang are answered all the same."""

import os
import signal
import sys
import time

import pytest

from llmtrain.checks.doctor import examination, probe
from llmtrain.checks.doctor.examination import ask


def raising() -> probe.Answer:
    raise ValueError("on\npurpose")


def test_the_answer_of_a_forked_process() -> None:
    assert probe.finish(probe.start_child(lambda: {"number": 7})) == {"number": 7}
    assert probe.finish(probe.start_child(raising)) == {"error": "ValueError: on purpose"}
    killed = probe.finish(probe.start_child(lambda: {"never": os.kill(os.getpid(), signal.SIGKILL)}))
    assert killed == {"error": "the process ended with -9"}


def test_a_forked_process_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "CHILD_SECONDS", 1)
    answer = probe.finish(probe.start_child(lambda: {"never": time.sleep(60)}))
    assert answer == {"error": "no end within 1 s"}


def test_imports_that_fail_are_told_with_their_error() -> None:
    assert ask("imports", "json", "no_such_module") == {
        "json": None,
        "no_such_module": "ModuleNotFoundError: No module named 'no_such_module'",
    }


def test_a_probe_without_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask("no such probe") == {"error": "KeyError: 'no such probe'"}
    monkeypatch.setattr(examination, "probe_command", lambda *_: ["/bin/sh", "-c", "echo words; echo last >&2; exit 3"])
    assert ask("") == {"error": "the process ended with 3: last"}


def test_a_probe_that_hangs_is_ended_with_its_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examination, "PROBE_SECONDS", 0.5)
    monkeypatch.setattr(examination, "probe_command", lambda *_: ["/bin/sh", "-c", "sleep 600 & wait"])
    began = time.monotonic()
    assert "no answer within" in ask("")["error"]
    assert time.monotonic() - began < 300, "the child held the pipe"


def test_a_probe_is_alone_whoever_started_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code = "import os, json; print(json.dumps({'rank': os.environ.get('RANK')}))"
    monkeypatch.setattr(examination, "probe_command", lambda *_: [sys.executable, "-c", code])
    assert ask("") == {"rank": None}
