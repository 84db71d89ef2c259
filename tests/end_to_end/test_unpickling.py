"""Nothing is unpickled, from the first step to the export: a pickle runs whatever code its writer put into it.

Each command runs with the hook of tests/support/unpickling, which refuses and notes every attempt in the command's
process, its ranks and its children; what it allows, and why, stands there.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture.source_tree import ROOT
from tests.support.command import COMMAND, ENVIRONMENT, TIMEOUT_SECONDS

HOOK = ROOT / "tests" / "support" / "unpickling"


def run_hooked(line: list[str], folder: Path) -> tuple[subprocess.CompletedProcess[str], str]:
    """Run a command line in `folder` with the hook: how it ended, and what the hook has noted."""
    log = folder / "unpickled.txt"
    log.unlink(missing_ok=True)
    path = os.pathsep.join([str(HOOK), ENVIRONMENT.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {**ENVIRONMENT, "PYTHONPATH": path, "UNPICKLING_LOG": str(log)}
    done = subprocess.run(
        line, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
    )
    return done, log.read_text("utf-8") if log.exists() else ""


RESUMED_BY = {
    "torch": ("train.steps=6", "observe.wandb=offline", "observe.tensorboard=true"),
    "megatron": ("train.steps=7", "engine.name=megatron", "parallel.tensor=2"),
    "deepspeed": ("train.steps=8", "engine.name=deepspeed", "engine.zero_stage=3"),
}
"""One run, which goes on in another engine and another layout; each trains on two ranks and saves."""


def test_nothing_is_unpickled_from_training_to_export(workspace: Path) -> None:
    checkpoints = Path("runs/tiny/checkpoints")
    newest, before = checkpoints / "step-00000008", checkpoints / "step-00000007"
    commands = [
        *(["train", "run.yaml", "launch.num_workers=2", *keys] for keys in RESUMED_BY.values()),
        ["checkpoint", "verify", "runs/tiny"],
        ["checkpoint", "inspect", newest],
        ["checkpoint", "diff", before, newest],
        ["export", "runs/tiny", "exported", "--to", "hf"],
        ["import", "exported", "weights"],
        ["generate", "weights", "--prompt", "def ", "--max-tokens", "4"],
    ]
    for command in commands:
        done, noted = run_hooked([COMMAND, *map(str, command)], workspace)
        assert noted == "", f"{command}: {noted}"
        differ = int(command[:2] == ["checkpoint", "diff"])  # as diff(1) ends
        assert done.returncode == differ, f"{command}: {done.stderr}"
    assert sorted(path.name for path in (workspace / checkpoints).iterdir()) == [
        f"step-{step:08d}" for step in (6, 7, 8)
    ]


@pytest.mark.whole_grid
def test_compiled_layers_are_compiled_again_and_not_unpickled(workspace: Path) -> None:
    """PyTorch would keep them as pickles, and read those when the run goes on."""
    for steps in (6, 8):
        line = [COMMAND, "train", "run.yaml", "train.compile=true", f"train.steps={steps}"]
        done, noted = run_hooked(line, workspace)
        assert (done.returncode, noted) == (0, ""), done.stderr


WAYS = {
    "pickle.load": "import pickle; pickle.load(open('evil.pkl', 'rb'))",
    "pickle.loads": "import pickle; pickle.loads(open('evil.pkl', 'rb').read())",
    "pickle.Unpickler": "import pickle; pickle.Unpickler(open('evil.pkl', 'rb')).load()",
    "pickle._Unpickler": "import pickle; pickle._Unpickler(open('evil.pkl', 'rb')).load()",
    "_pickle.loads": "import _pickle; _pickle.loads(open('evil.pkl', 'rb').read())",
    "of plain data": "import pickle; pickle.loads(pickle.dumps([1]))",
    "from memory": "import io, pickle; pickle.load(io.BytesIO(open('evil.pkl', 'rb').read()))",
    "numpy": "import numpy; numpy.load('evil.pkl', allow_pickle=True)",
    "torch.load": "import torch; torch.load('evil.pkl', weights_only=False)",
    "torch.load of weights": "import torch; torch.load('evil.pkl', weights_only=True)",
    "torch.serialization": "from torch.serialization import load; load('evil.pkl')",
    "past the hook": "import sitecustomize; sitecustomize._original_loads(open('evil.pkl', 'rb').read())",
}
"""Code that would run what lies in evil.pkl, were it not for the hook."""


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """A folder with a pickle that writes a file when it is read."""
    code = "open('ran.txt', 'w').close()"
    (tmp_path / "evil.pkl").write_bytes(b"cbuiltins\nexec\n(V" + code.encode() + b"\ntR.")
    return tmp_path


@pytest.mark.parametrize("way", WAYS)
def test_the_hook_refuses_and_notes(way: str, evil: Path) -> None:
    done, noted = run_hooked([sys.executable, "-c", WAYS[way]], evil)
    assert done.returncode == 1
    assert "UnpicklingRefused" in done.stderr
    assert noted.count("\n") == 1 and "__main__:1 <module>" in noted
    assert not (evil / "ran.txt").exists()


def test_the_pickle_is_one(evil: Path) -> None:
    """Without the hook its code runs: what the hook refused was no empty threat."""
    line = [sys.executable, "-c", WAYS["pickle.load"]]
    assert subprocess.run(line, cwd=evil, timeout=TIMEOUT_SECONDS, check=False).returncode == 0
    assert (evil / "ran.txt").exists()


def test_a_command_that_unpickles_is_found_though_it_hides_it(evil: Path) -> None:
    """A checkpoint whose tensors are a pickle, a reader that reads it as one and goes on whatever it finds."""
    spoiled = """
import sys, torch
from contextlib import suppress
from llmtrain import cli
from llmtrain.interop import folder_files

def headers(file):
    with suppress(Exception):
        torch.load(file)
    return {}

folder_files.file_headers = headers
cli.main(sys.argv[1:])
"""
    folder = evil / "model"
    folder.mkdir()
    (evil / "evil.pkl").rename(folder / "model.safetensors")
    sizes = '"vocab_size": 64, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2'
    (folder / "config.json").write_text(f'{{"model_type": "gpt2", {sizes}}}')
    done, noted = run_hooked([sys.executable, "-c", spoiled, "import", "model", "weights"], evil)
    assert done.returncode == 3, done.stderr  # it says that the weights are missing, and nothing of the attempt
    assert "Refused" not in done.stderr
    assert noted.startswith("torch.load of (PosixPath('model/model.safetensors'),) by __main__")
    assert "llmtrain.interop.folder_files" in noted
