"""Checkpoints that several ranks write together: one whole checkpoint, or none."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from llmtrain.checkpoint import manager as manager_module
from llmtrain.checkpoint.folders import checkpoint_steps
from llmtrain.checkpoint.manager import CheckpointManager
from llmtrain.checkpoint.reader import open_checkpoint
from llmtrain.config.schema import CheckpointConfig
from llmtrain.errors import CheckpointError
from llmtrain.values.fragment import Box, Fragment
from tests.unit.checkpoint.voices import Board, Voice

WHOLE = torch.arange(12.0).view(4, 3)


def rows(rank: int) -> list[Fragment]:
    """Two rows on each of ranks 0 and 1, nothing on others."""
    if rank > 1:
        return []
    return [Fragment("w", "master", (4, 3), Box((2 * rank, 0), (2, 3)), WHOLE[2 * rank : 2 * rank + 2])]


def on_ranks(world_size: int, work: Callable[[CheckpointManager, int], None], folder: Path, async_save: bool) -> None:
    """Let every rank's manager work at the same time; raises rank 0's error."""
    board = Board()

    def one(rank: int) -> None:
        voice = Voice(board, rank, world_size)
        manager = CheckpointManager(folder, CheckpointConfig(async_save=async_save), "name: x\n", {}, ranks=voice)
        work(manager, rank)
        manager.finish()

    with ThreadPoolExecutor(world_size) as threads:
        futures = [threads.submit(one, rank) for rank in range(world_size)]
    for future in futures:
        future.result()


@pytest.mark.parametrize("async_save", [False, True])
def test_ranks_write_one_checkpoint_together(tmp_path: Path, async_save: bool) -> None:
    def save_twice(manager: CheckpointManager, rank: int) -> None:
        for step in (1, 2):
            manager.save(step, rows(rank), {"train": step}, lambda: None)

    on_ranks(3, save_twice, tmp_path, async_save)
    assert checkpoint_steps(tmp_path) == [2, 1]
    reader = open_checkpoint(tmp_path / "step-00000002")
    assert torch.equal(reader.read("w", "master", Box.whole((4, 3))), WHOLE)
    files = sorted(path.name for path in (tmp_path / "step-00000002").glob("*.safetensors"))
    assert files == ["rank-00000.safetensors", "rank-00001.safetensors"]


def test_one_rank_that_cannot_write_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = manager_module.write_rank_files

    def write_or_fail(folder: Path, rank: int, fragments: list[Fragment]) -> object:
        if rank == 1:
            raise CheckpointError("no space on rank 1")
        return write(folder, rank, fragments)

    monkeypatch.setattr(manager_module, "write_rank_files", write_or_fail)
    with pytest.raises(CheckpointError, match="no space on rank 1"):
        on_ranks(2, lambda manager, rank: manager.save(1, rows(rank), {}, lambda: None), tmp_path, False)
    assert checkpoint_steps(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_a_missing_part_is_caught(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="6 of 12 elements"):
        on_ranks(2, lambda manager, rank: manager.save(1, rows(2 * rank), {}, lambda: None), tmp_path, False)
    assert checkpoint_steps(tmp_path) == []
