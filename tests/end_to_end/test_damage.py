"""Damaged data and checkpoints: exit code 3, the file named, expected and actual hash."""

import shutil
from hashlib import sha256
from pathlib import Path

from tests.support.command import llmtrain


def flip(path: Path, position: int) -> tuple[str, str]:
    """Change one byte; returns the hash before and after."""
    before = path.read_bytes()
    after = before[:position] + bytes([before[position] ^ 1]) + before[position + 1 :]
    path.write_bytes(after)
    return sha256(before).hexdigest(), sha256(after).hexdigest()


def test_a_corrupt_shard_ends_training_with_its_hashes(workspace: Path) -> None:
    shards = workspace / "copy"
    shutil.copytree(workspace / "data", shards)
    shard = next((shards / "train").glob("*.tar"))
    expected, actual = flip(shard, shard.stat().st_size // 2)
    done = llmtrain("train", "run.yaml", "data.train.0.path=copy/train", folder=workspace)
    assert done.returncode == 3, done.stderr
    for part in (shard.name, expected, actual):
        assert part in done.stderr
    assert "Traceback" not in done.stderr


def test_a_corrupt_checkpoint_is_passed_over_or_named(workspace: Path) -> None:
    assert llmtrain("train", "run.yaml", folder=workspace).returncode == 0
    checkpoints = workspace / "runs" / "tiny" / "checkpoints"
    newest = checkpoints / "step-00000040"
    tensors = next(newest.glob("*.safetensors"))
    expected, actual = flip(tensors, tensors.stat().st_size - 100)

    verified = llmtrain("checkpoint", "verify", newest, folder=workspace)
    resumed = llmtrain("train", "run.yaml", "name=other", f"checkpoint.resume={newest}", folder=workspace)
    for done in (verified, resumed):
        assert done.returncode == 3
        for part in (tensors.name, expected, actual):
            assert part in done.stderr + done.stdout
        assert "Traceback" not in done.stderr

    again = llmtrain("train", "run.yaml", folder=workspace)
    assert again.returncode == 0, again.stderr
    assert "from step 20" in again.stderr
    assert not list(checkpoints.glob("step-*/.tmp*"))
