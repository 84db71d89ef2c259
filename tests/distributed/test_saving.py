"""A save of several ranks: what ranks say to each other while it runs behind training."""

import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

# It is documented, but torch does not list it among its exports.
from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]

from launch.rank.rendezvous import TorchRankStore
from llmtrain.checkpoint.manager import CheckpointManager
from llmtrain.checkpoint.reader import open_checkpoint
from llmtrain.config.schema import CheckpointConfig
from llmtrain.values.fragment import Box, Fragment
from tests.support.collectives import Collectives
from tests.support.ranks import run_ranks


def exchange_of(store: Path, rank: int, world_size: int) -> TorchRankStore:
    texts = FileStore(str(store), world_size)
    texts.set_timeout(timedelta(seconds=30))
    return TorchRankStore(texts, rank, world_size, 30)


def gathered(rank: int, world_size: int) -> Iterator[Fragment]:
    """The fragments of an engine that must ask other ranks for them, as ZeRO does."""
    for name in ("first", "second"):
        whole = torch.full((2 * world_size,), float(rank))
        dist.all_reduce(whole)
        yield Fragment(name, "master", (2 * world_size,), Box((2 * rank,), (2,)), whole[2 * rank : 2 * rank + 2])


def collectives_of_a_save(rank: int, world_size: int, folder: Path, async_save: bool) -> tuple[int, int, bool]:
    """Calls of collectives while the state is taken, and while it is written; whether a thread of its own wrote."""
    writing, writers = Collectives(), []
    write = CheckpointManager._write

    def watched(self: CheckpointManager, *args: Any) -> None:
        writers.append(threading.current_thread())
        with writing:
            write(self, *args)

    pytest.MonkeyPatch().setattr(CheckpointManager, "_write", watched)  # for good: the process is this call's own
    settings, exchange = CheckpointConfig(async_save=async_save), exchange_of(folder / "store", rank, world_size)
    manager = CheckpointManager(folder / "checkpoints", settings, "", {}, ranks=exchange)
    with Collectives() as training:
        manager.save(1, gathered(rank, world_size), {}, lambda: None)
    manager.finish()
    return training.calls.total(), writing.calls.total(), writers == [threading.main_thread()]


@pytest.mark.parametrize("async_save", [True, False])
def test_no_collective_runs_while_a_checkpoint_is_written(tmp_path: Path, async_save: bool) -> None:
    for training, writing, in_main_thread in run_ranks(collectives_of_a_save, 2, tmp_path, async_save):
        assert (training, writing, in_main_thread) == (2, 0, not async_save)
    assert open_checkpoint(tmp_path / "checkpoints" / "step-00000001").num_files == 4


def collectives_seen_in_a_thread(rank: int, world_size: int) -> int:
    seen = Collectives()

    def work() -> None:
        with seen:
            dist.all_reduce(torch.zeros(1))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return seen.calls.total()


def test_a_collective_in_another_thread_would_be_seen() -> None:
    assert run_ranks(collectives_seen_in_a_thread, 2) == [1, 1]
