"""What a save and a load may take: bytes read of those needed, memory beyond what the engine holds."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llmtrain.checkpoint.manager import CheckpointManager
from llmtrain.checkpoint.reader import open_checkpoint
from llmtrain.checkpoint.writer import Contents, publish, start_checkpoint, write_rank_files
from llmtrain.config.schema import CheckpointConfig
from llmtrain.engines.masters import Placement, iter_range_boxes, read_range, split_box
from llmtrain.values.fragment import Box, Fragment
from tests.support.memory import peak_growth
from tests.support.ranks import run_ranks

SHAPES = {"q": ((1024, 1024), 0), "up": ((4096, 1024), 0), "down": ((1024, 4096), 1), "norm": ((1024,), None)}
"""Shape of each weight and the dimension that tensor parallelism cuts."""

LARGEST_BYTES = 4 * 4096 * 1024
NUM_LAYERS = 4
MIB = 1 << 20

Layout = tuple[int, int]
"""Ranks that cut every weight, and ranks that share each part as ZeRO does."""


def iter_parts(layout: Layout, rank: int) -> Iterator[tuple[Placement, tuple[int, int]]]:
    """Every weight's part on a rank: its place and the elements of it, flattened, that the rank holds."""
    tensor, data = layout
    for layer in range(NUM_LAYERS):
        for name, (shape, dim) in SHAPES.items():
            cuts = {} if dim is None else {dim: (rank % tensor, tensor)}
            owned = dim is not None or rank % tensor == 0
            place = Placement(f"layers.{layer}.{name}", shape, split_box(shape, cuts), owned)
            size, part = place.box.num_elements, rank // tensor
            yield place, (size * part // data, size * (part + 1) // data) if place.owned else (0, 0)


def iter_fragments(layout: Layout, rank: int) -> Iterator[Fragment]:
    for place, (start, stop) in iter_parts(layout, rank):
        flat = torch.full((stop - start,), float(rank))
        for box, offset in iter_range_boxes(place.box, start, stop):
            part = flat[offset : offset + box.num_elements].view(box.shape)
            yield Fragment(place.name, "master", place.global_shape, box, part)


def saved(folder: Path, layout: Layout) -> Path:
    writing = start_checkpoint(folder, 1)
    ranks = range(layout[0] * layout[1])
    parts = [write_rank_files(writing, rank, iter_fragments(layout, rank)) for rank in ranks]
    return publish(writing, parts, Contents(1, {}, "", {}), lambda: None)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((1, 1), (2, 1)),
        ((1, 1), (8, 1)),
        ((8, 1), (1, 1)),
        ((8, 1), (2, 1)),
        ((1, 4), (1, 3)),
        ((2, 2), (4, 3)),
        ((4, 3), (2, 2)),
        ((1, 3), (8, 1)),
    ],
)
def test_a_load_reads_what_it_needs(tmp_path: Path, source: Layout, target: Layout) -> None:
    path = saved(tmp_path, source)
    read = needed = 0
    for rank in range(target[0] * target[1]):
        reader = open_checkpoint(path, verify=False)
        for place, span in iter_parts(target, rank):
            part = torch.empty(span[1] - span[0])
            read_range(reader, place, "master", span, part)
            needed += part.nbytes
        read += reader.bytes_read
    assert needed <= read <= 1.05 * needed


def state() -> list[Fragment]:
    return list(iter_fragments((1, 1), 0))


def save_rank(rank: int, world_size: int, folder: Path, async_save: bool) -> int:
    manager = CheckpointManager(folder, CheckpointConfig(async_save=async_save), "", {})
    held = state()

    def work() -> None:
        manager.save(1, held, {}, lambda: None)
        manager.finish()

    return peak_growth(work)


def load_rank(rank: int, world_size: int, path: Path, target: Layout) -> int:
    parts = [(place, span, torch.ones(span[1] - span[0])) for place, span in iter_parts(target, 0)]

    def work() -> None:
        reader = open_checkpoint(path)
        for place, span, part in parts:
            read_range(reader, place, "master", span, part)

    return peak_growth(work)


def keep_everything_rank(rank: int, world_size: int, path: Path) -> int:
    """A load as it must not be: everything is read before anything is used."""
    reader = open_checkpoint(path)
    kept: list[torch.Tensor] = []

    def work() -> None:
        kept.extend(reader.read(info.name, info.kind, Box.whole(info.shape)) for info in reader.tensors())

    return peak_growth(work)


on_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux for the peak of memory")


@on_linux
@pytest.mark.parametrize("async_save", [False, True])
def test_a_save_takes_little_memory_beyond_one_copy(tmp_path: Path, async_save: bool) -> None:
    """A synchronous save: some chunks. One behind training: the copy that it writes from, too."""
    copy = sum(fragment.tensor.nbytes for fragment in state()) if async_save else 0
    (growth,) = run_ranks(save_rank, 1, tmp_path, async_save)
    print(f"save, async {async_save}: {growth / MIB:.0f} MiB, of which the copy {copy / MIB:.0f}")
    assert growth - copy <= 1.0 * LARGEST_BYTES + 8 * MIB


@on_linux
@pytest.mark.parametrize(("source", "target"), [((1, 1), (1, 1)), ((1, 1), (2, 1)), ((8, 1), (1, 1)), ((2, 2), (1, 3))])
def test_a_load_takes_little_memory_beyond_what_it_fills(tmp_path: Path, source: Layout, target: Layout) -> None:
    (growth,) = run_ranks(load_rank, 1, saved(tmp_path, source), target)
    print(f"load {source} -> {target}: {growth / MIB:.0f} MiB")
    assert growth <= 2 * LARGEST_BYTES + 8 * MIB


@on_linux
def test_a_load_that_keeps_everything_is_seen(tmp_path: Path) -> None:
    (growth,) = run_ranks(keep_everything_rank, 1, saved(tmp_path, (1, 1)))
    assert growth > 6 * LARGEST_BYTES
