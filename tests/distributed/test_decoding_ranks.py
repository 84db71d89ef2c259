"""A model that is opened on several ranks: the text of one process, faults in words, no rank left behind."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.hf_folders import write_llama

PROGRAM = """
import os, signal, sys
import psutil, torch
from pathlib import Path
from launch.decoding import open_trained
from llmtrain.errors import LlmtrainError
from llmtrain.infer.batching.request import Request
from llmtrain.infer.batching.sampling import Sampling
from llmtrain.infer.generate import iter_tokens

def written(trained):
    return list(iter_tokens(trained, Request((5, 6, 7), 12, Sampling(0.8, seed=2))))

path, act, keys = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
try:
    with open_trained(path, keys, "cpu") as trained:
        print(written(trained))
        if act == "threads":
            print(torch.get_num_threads())
        if act == "kill":
            (other,) = psutil.Process().children()
            other.kill()
        print(written(trained))
except LlmtrainError as error:
    print(f"{type(error).__name__}: {error}")
print("left behind:", len(psutil.Process().children()))
"""


def opened(path: Path, *arguments: str) -> list[str]:
    """The lines that the program prints, in a process of its own: it forks."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path), *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("decoding") / "llama")


def test_two_ranks_write_what_one_process_writes_text_after_text(folder: Path) -> None:
    alone = opened(folder, "stay")
    assert alone[0] == alone[1] and alone[2] == "left behind: 0"
    assert opened(folder, "stay", "parallel.tensor=2", "launch.num_workers=2") == alone


def test_one_rank_has_the_threads_that_are_asked_for(folder: Path) -> None:
    assert opened(folder, "threads", "launch.threads_per_worker=3")[1] == "3"


def test_the_death_of_a_rank_is_told_and_ends_the_others(folder: Path) -> None:
    first, told, *_, left = opened(folder, "kill", "parallel.pipeline=2")
    assert first.startswith("[")
    assert told.startswith("LaunchError: rank 1 on ") and "was killed by SIGKILL" in told
    assert left == "left behind: 0"


def test_keys_that_do_not_fit_are_told_together(folder: Path) -> None:
    told = "\n".join(opened(folder, "stay", "parallel.tensor=3", "launch.num_workers=2", "parallel.context=2"))
    assert "Known here: tensor, pipeline, pipeline_split." in "\n".join(opened(folder, "stay", "parallel.ranks=2"))
    assert "parallel.tensor = 3 (command line): must divide model.num_heads" in told
    assert "launch.num_workers = 2 (command line): must be parallel.tensor x parallel.pipeline = 3" in told
    assert "parallel.context (command line): has no meaning in decoding" in told
