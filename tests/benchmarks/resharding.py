"""Loading a checkpoint with another layout on two ranks: our reader beside PyTorch's distributed checkpoint.

Both read safetensors files. What a load costs is counted where it cannot be hidden: bytes that came from the disk, with
nothing of the files in the page cache, and resident memory beyond what the load fills. Each rank reads a copy of its
own, as it would on a machine of its own: in one page cache, what one rank reads too much is what another needs.
"""

import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from llmtrain.checkpoint.reader import open_checkpoint
from llmtrain.checkpoint.writer import Contents, publish, start_checkpoint, write_rank_files
from llmtrain.values.fragment import Box, Fragment
from tests.benchmarks.measuring import Options, Row, Table
from tests.support.memory import peak_growth
from tests.support.ranks import run_ranks

NUM_RANKS = 2
NUM_LAYERS = 4
KINDS = ("master", "exp_avg", "exp_avg_sq")
CUT = {"q": 0, "up": 0, "down": 1}
"""The dimension of each weight that tensor parallelism cuts."""

RESHARDS = [("tensor", "pipeline"), ("whole", "tensor")]
OURS = "llmtrain"
OURS_VERIFIED = "llmtrain, rank 0 hashes every file first"
PEER = "PyTorch DCP, safetensors"


@dataclass(frozen=True)
class Load:
    """What one rank's load took. `disk_bytes` came from the disk, `peak_bytes` were held beyond what was filled."""

    seconds: float
    needed_bytes: int
    disk_bytes: int
    peak_bytes: int


def benchmark(options: Options) -> list[Table]:
    """For each change of layout: seconds, bytes read over bytes needed, peak memory over the largest tensor."""
    width = 64 if options.quick else 1024
    tables = []
    for source, target in RESHARDS:
        with tempfile.TemporaryDirectory() as folder:
            paths = {OURS: Path(folder) / "ours", PEER: Path(folder) / "dcp"}
            paths[OURS_VERIFIED] = paths[OURS]
            for name in (OURS, PEER):
                run_ranks(SAVES[name], NUM_RANKS, copy_of(paths[name], 0), source, width)
                shutil.copytree(copy_of(paths[name], 0), copy_of(paths[name], 1))
            loads: dict[str, list[list[Load]]] = {name: [] for name in LOADS}
            for _ in range(options.rounds):
                for name, path in paths.items():
                    forget_pages(path)
                    loads[name].append(run_ranks(LOADS[name], NUM_RANKS, path, target, width))
        tables += figures(f"{source} -> {target}", loads, largest_bytes=16 * width * width)
    return tables


def figures(title: str, loads: dict[str, list[list[Load]]], largest_bytes: int) -> list[Table]:
    def rows(figure: Callable[[list[Load]], float]) -> tuple[Row, ...]:
        return tuple(Row(name, tuple(figure(ranks) for ranks in rounds)) for name, rounds in loads.items())

    def read_over_needed(ranks: list[Load]) -> float:
        return sum(load.disk_bytes for load in ranks) / sum(load.needed_bytes for load in ranks)

    def peak(ranks: list[Load]) -> float:
        return max(load.peak_bytes for load in ranks) / largest_bytes

    return [
        Table(f"Load, {title}", "s", "lower", OURS, rows(lambda ranks: max(load.seconds for load in ranks))),
        Table(f"Read from the disk over needed, {title}", "x", "lower", None, rows(read_over_needed)),
        Table(f"Peak memory over the largest tensor, {title}", "x", "lower", None, rows(peak)),
    ]


def copy_of(path: Path, rank: int) -> Path:
    return path.with_name(f"{path.name}-{rank}")


def forget_pages(folder: Path) -> None:
    """Let the next reader find nothing of these files in memory."""
    os.sync()
    for path in folder.parent.rglob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def iter_places(layout: str, rank: int, width: int) -> Iterator[tuple[str, str, tuple[int, ...], int, Box]]:
    """(name, kind, global shape, dimension that is cut, box) of every tensor that a rank of a layout holds."""
    shapes = {"q": (width, width), "up": (4 * width, width), "down": (width, 4 * width)}
    for layer in range(NUM_LAYERS):
        here = {"whole": rank == 0, "tensor": True, "pipeline": layer * NUM_RANKS // NUM_LAYERS == rank}[layout]
        for name, dim in CUT.items() if here else ():
            shape = shapes[name]
            parts = NUM_RANKS if layout == "tensor" else 1
            offsets = tuple(size // parts * rank if d == dim and parts > 1 else 0 for d, size in enumerate(shape))
            sizes = tuple(size // parts if d == dim else size for d, size in enumerate(shape))
            for kind in KINDS:
                yield f"layers.{layer}.{name}", kind, shape, dim, Box(offsets, sizes)


def save_ours(rank: int, world_size: int, path: Path, layout: str, width: int) -> None:
    held = [
        Fragment(name, kind, shape, box, torch.full(box.shape, float(rank)))
        for name, kind, shape, _, box in iter_places(layout, rank, width)
    ]
    writing = path.parent / "writing-step-00000001"
    if rank == 0:
        start_checkpoint(path.parent, 1)
    dist.barrier()
    parts: list[Any] = [None] * world_size
    dist.all_gather_object(parts, write_rank_files(writing, rank, held))
    if rank == 0:
        publish(writing, parts, Contents(1, {}, "", {}), lambda: None).rename(path)


def save_dcp(rank: int, world_size: int, path: Path, layout: str, width: int) -> None:
    state = {
        f"{kind}/{name}": as_dcp(torch.full(box.shape, float(rank)), layout, dim)
        for name, kind, _, dim, box in iter_places(layout, rank, width)
    }
    with quiet():
        dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(str(path), save_distributed=True))


def as_dcp(tensor: Tensor, layout: str, dim: int) -> Tensor:
    """The tensor, which is a part or a whole, as PyTorch's checkpoint wants to be told."""
    if layout != "tensor":
        return tensor
    return DTensor.from_local(tensor, init_device_mesh("cpu", (NUM_RANKS,)), [Shard(dim)])


def load_ours(rank: int, world_size: int, path: Path, layout: str, width: int, verify: bool = False) -> Load:
    targets = [(name, kind, box, torch.ones(box.shape)) for name, kind, _, _, box in iter_places(layout, rank, width)]

    def load() -> None:
        reader = open_checkpoint(copy_of(path, rank), verify=verify and rank == 0)
        for name, kind, box, target in targets:
            target.copy_(reader.read(name, kind, box))

    return measured(load, [target for *_, target in targets])


def load_ours_verified(rank: int, world_size: int, path: Path, layout: str, width: int) -> Load:
    return load_ours(rank, world_size, path, layout, width, verify=True)


def load_dcp(rank: int, world_size: int, path: Path, layout: str, width: int) -> Load:
    state = {
        f"{kind}/{name}": as_dcp(torch.ones(box.shape), layout, dim)
        for name, kind, _, dim, box in iter_places(layout, rank, width)
    }

    def load() -> None:
        with quiet():
            dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(copy_of(path, rank))))

    return measured(load, [t.to_local() if isinstance(t, DTensor) else t for t in state.values()])


def measured(load: Callable[[], None], targets: list[Tensor]) -> Load:
    """Load into tensors that are there already, all ranks at the same time."""
    dist.barrier()
    disk, started = bytes_from_disk(), time.perf_counter()
    peak = peak_growth(load)
    seconds = time.perf_counter() - started
    return Load(seconds, sum(target.nbytes for target in targets), bytes_from_disk() - disk, max(0, peak))


def bytes_from_disk() -> int:
    """What this process has made the disk read, ahead of what it asked for included."""
    lines = Path("/proc/self/io").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def quiet() -> warnings.catch_warnings:
    return warnings.catch_warnings(action="ignore")


SAVES: dict[str, Callable[..., None]] = {OURS: save_ours, PEER: save_dcp}
LOADS: dict[str, Callable[..., Load]] = {OURS: load_ours, OURS_VERIFIED: load_ours_verified, PEER: load_dcp}
