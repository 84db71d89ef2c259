import json
import subprocess
from pathlib import Path

import pytest
import torch

from llmtrain.files import unsealed
from llmtrain.observe.machine import describe_environment, save_environment, source_commit


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_versions_and_machine_are_there_and_no_environment_variable_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOME_API_KEY", "canary-4711")
    save_environment(tmp_path)
    text = (tmp_path / "environment.json").read_text()
    assert "canary-4711" not in text
    environment = unsealed(json.loads(text))
    assert environment["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert environment["cpu"]["usable"] >= 1
    assert environment["cpu"]["memory_bytes"] > 1 << 28
    assert len(environment["devices"]) == torch.cuda.device_count()
    assert describe_environment() == environment


def test_the_commit_is_that_of_the_repository_that_tracks_the_file(tmp_path: Path):
    source = tmp_path / "module.py"
    source.write_text("one = 1\n")
    assert source_commit(source) is None
    git(tmp_path, "init", "-q")
    assert source_commit(source) is None, "an untracked file belongs to no commit"
    git(tmp_path, "add", "module.py")
    git(tmp_path, "commit", "-q", "-m", "one")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert source_commit(source) == commit
    source.write_text("one = 2\n")
    assert source_commit(source) == commit + "+changes"
