"""Messages of the packages: what a command shows, on which rank, and what a program that uses them can do about it."""

import ast
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest

from llmtrain.messages import LOGGERS, show_messages
from tests.architecture.source_tree import PACKAGES, read_sources


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    show_messages()


def say(name: str = "llmtrain.some.module") -> None:
    logging.getLogger(name).info("going on")
    logging.getLogger(name).warning("a disk is full")


def test_rank_0_shows_all(capsys: pytest.CaptureFixture[str]) -> None:
    say()
    assert capsys.readouterr().err == "going on\nwarning: a disk is full\n"


def test_other_ranks_show_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    show_messages(rank=3)
    say()
    assert capsys.readouterr().err == "warning: a disk is full\n"


def test_no_credentials_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("launch.x").warning("%s: no such shard", "s3://user:secret@bucket/shard")
    assert capsys.readouterr().err == "warning: s3://bucket/shard: no such shard\n"


def test_nothing_is_said_twice(capsys: pytest.CaptureFixture[str]) -> None:
    guest = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(guest)
    try:
        show_messages()
        show_messages()
        say("data_pipelines.x")
    finally:
        logging.getLogger().removeHandler(guest)
    assert capsys.readouterr().err == "going on\nwarning: a disk is full\n"


def test_each_package_is_shown() -> None:
    assert LOGGERS == PACKAGES


def test_a_program_can_silence_them() -> None:
    """Without the command, Python's own rules hold: warnings go to stderr until the program says otherwise."""
    code = (
        "import logging, llmtrain.checkpoint.find as find\n"
        "find._logger.info('quiet'); find._logger.warning('one')\n"
        "logging.getLogger('llmtrain').setLevel(logging.ERROR); find._logger.warning('two')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stderr == "one\n"


def test_the_packages_print_only_in_commands() -> None:
    """A library that prints cannot be silenced. What commands answer is theirs to print."""
    printing = {
        source.path
        for source in read_sources()
        if not source.path.startswith(("llmtrain/cli/", "llmtrain/checks/"))
        for node in ast.walk(source.parsed())
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("print", "sys.stderr.write", "sys.stdout.write", "typer.echo")
    }
    assert printing == {
        "launch/on_ray/jobs.py",  # passes on what a job writes
        "launch/rank/signals.py",  # in a signal handler, which must wait for no lock
        "launch/rank/worker.py",  # the answer of `train` to a finished run
    }
