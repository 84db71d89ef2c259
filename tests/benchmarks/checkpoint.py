"""Saving and loading a state of about 1 GB beside the ways there are to do it, and what training waits for."""

import hashlib
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from llmtrain.checkpoint.folders import step_folder_name
from llmtrain.checkpoint.manager import CheckpointManager
from llmtrain.checkpoint.reader import open_checkpoint
from llmtrain.checkpoint.tensor_file import iter_chunks, write_all
from llmtrain.config.schema import CheckpointConfig
from llmtrain.values.fragment import Box, Fragment
from tests.benchmarks.measuring import Measurement, Options, Row, Table, measure

OURS = "llmtrain: save, hashed and synced"
LATER = "llmtrain: asynchronous save, memory kept"
OURS_LOAD = "llmtrain: load"
SYNCED = "raw write, synced"
HASH = "sha256 alone, nothing written"
SLOWER = "the slower of raw write, synced, and sha256"
LOAD_NOTES = (
    "into tensors that are there already; all files are in the page cache; only the row that says so checks hashes",
)
State = dict[str, Tensor]


def benchmark(options: Options) -> list[Table]:
    """Gigabytes per second of synchronous saves and of loads; milliseconds of the stall of an asynchronous save."""
    state = random_state(width=128 if options.quick else 1024)
    gigabytes = sum(tensor.nbytes for tensor in state.values()) / 1e9
    with tempfile.TemporaryDirectory() as folder:
        writers = {name: written_by(write, Path(folder), state) for name, write in ways_to_write(state).items()}
        speeds = measure(writers, options.rounds)
        stalls = measure(ways_to_stall(state, Path(folder)), options.rounds)
        loads = measure(ways_to_load(state, Path(folder)), options.rounds)
    speed_notes = (
        f"{OURS} also writes a manifest and renames; peers sync nothing unless their name says so",
        "llmtrain: bytes only writes the same file without hash and sync",
    )
    slowest = Row(SLOWER, tuple(map(min, *(row.values for row in speeds if row.name in (SYNCED, HASH)))))
    return [
        Table(f"Checkpoint of {gigabytes:.2f} GB", "GB/s", "higher", OURS, (*speeds, slowest), speed_notes),
        Table(f"Load of {gigabytes:.2f} GB, from memory", "GB/s", "higher", OURS_LOAD, loads, LOAD_NOTES),
        Table(f"Stall of training, {gigabytes:.2f} GB", "ms", "lower", LATER, stalls),
    ]


def random_state(width: int) -> State:
    """80 matrices and their two moments, fp32; 1 GB at a width of 1024."""
    torch.manual_seed(0)
    kinds = ("master", "exp_avg", "exp_avg_sq")
    return {f"{kind} layers.{number}.weight": torch.randn(width, width) for kind in kinds for number in range(80)}


def fragments(state: State) -> list[Fragment]:
    return [
        Fragment.whole(name, kind, tensor)
        for (kind, name), tensor in zip(map(str.split, state), state.values(), strict=True)
    ]


def written_by(write: Callable[[Path], object], folder: Path, state: State) -> Measurement:
    """Write to a fresh path and remove what was written.

    A virtual machine gets memory for the page cache from its host again after a while of not using it, which takes
    longer than the write itself and would fall on whoever comes first. So the same amount is written and removed
    before the clock starts, the same for every contender.
    """
    gigabytes = sum(tensor.nbytes for tensor in state.values()) / 1e9

    def run() -> float:
        path = folder / "written"
        os.sync()  # what the contender before left for the disk must not slow this one
        write_raw(path, state, sync=False)
        path.unlink()
        started = time.perf_counter()
        write(path)
        seconds = time.perf_counter() - started
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        return gigabytes / seconds

    return run


def ways_to_write(state: State) -> dict[str, Callable[[Path], object]]:
    return {
        OURS: lambda path: save(manager(path, async_save=False), state),
        "llmtrain: bytes only": lambda path: write_bytes_only(path, state),
        "raw write": lambda path: write_raw(path, state, sync=False),
        SYNCED: lambda path: write_raw(path, state, sync=True),
        HASH: lambda _: hash_only(state),
        "safetensors.save_file": lambda path: safetensors.torch.save_file(state, path),
        "torch.save": lambda path: torch.save(state, path),
        "PyTorch DCP": lambda path: save_dcp(path, state),
    }


def manager(folder: Path, *, async_save: bool) -> CheckpointManager:
    return CheckpointManager(
        folder, CheckpointConfig.model_validate({"async_save": async_save, "keep": 1}), config_text="", about={}
    )


def save(checkpoints: CheckpointManager, state: State, step: int = 1) -> None:
    checkpoints.save(step, fragments(state), {}, before_publish=lambda: None)


def write_bytes_only(path: Path, state: State) -> None:
    """The tensor file of a checkpoint, chunk by chunk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        for chunk in iter_chunks(state, {}):
            write_all(descriptor, chunk)
    finally:
        os.close(descriptor)


def write_raw(path: Path, state: State, *, sync: bool) -> None:
    with path.open("wb", buffering=0) as file:
        for tensor in state.values():
            file.write(tensor.numpy().data)
        if sync:
            os.fsync(file.fileno())


def hash_only(state: State) -> None:
    digest = hashlib.sha256()
    for tensor in state.values():
        digest.update(tensor.numpy().data)


def save_dcp(path: Path, state: State) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it runs in one process, which is meant
        save_distributed(state, checkpoint_id=path, no_dist=True)


def ways_to_stall(state: State, folder: Path) -> dict[str, Measurement]:
    """Training waits for `save`; the writing behind it is waited for outside the measurement."""
    kept = [torch.empty_like(tensor) for tensor in state.values()]
    lasting = manager(folder / "lasting", async_save=True)

    def stall(checkpoints: CheckpointManager) -> float:
        started = time.perf_counter()
        save(checkpoints, state)
        milliseconds = 1e3 * (time.perf_counter() - started)
        checkpoints.finish()
        return milliseconds

    def first_stall() -> float:
        return stall(manager(folder / "first", async_save=True))

    def copy_into_kept() -> float:
        started = time.perf_counter()
        for target, source in zip(kept, state.values(), strict=True):
            target.copy_(source)
        return 1e3 * (time.perf_counter() - started)

    return {
        LATER: lambda: stall(lasting),
        "one memory copy of the state": copy_into_kept,
        "llmtrain: first asynchronous save": first_stall,
    }


def ways_to_load(state: State, folder: Path) -> dict[str, Measurement]:
    """Each fills the same tensors from files that have just been written; half of the columns counts half the bytes."""
    targets = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    ours = folder / "ours"
    save(manager(ours, async_save=False), state)
    checkpoint = ours / step_folder_name(1)
    safetensors.torch.save_file(state, folder / "whole.safetensors")
    torch.save(state, folder / "whole.pt")
    save_dcp(folder / "dcp", state)

    def load_ours(columns: int = 1, verify: bool = False) -> None:
        reader = open_checkpoint(checkpoint, verify=verify)
        for key, target in targets.items():
            kind, name = key.split()
            part = target[:, : target.shape[1] // columns]
            part.copy_(reader.read(name, kind, Box((0, 0), tuple(part.shape))))

    def load_safetensors() -> None:
        for name, tensor in safetensors.torch.load_file(folder / "whole.safetensors").items():
            targets[name].copy_(tensor)

    def load_torch() -> None:
        for name, tensor in torch.load(folder / "whole.pt", mmap=True, weights_only=True).items():
            targets[name].copy_(tensor)

    def load_dcp() -> None:
        with warnings.catch_warnings(action="ignore"):
            load_distributed(targets, checkpoint_id=folder / "dcp", no_dist=True)

    size = sum(tensor.nbytes for tensor in state.values())
    return {
        OURS_LOAD: speed_of(load_ours, size),
        "llmtrain: load, hashes checked": speed_of(lambda: load_ours(verify=True), size),
        "llmtrain: half of the columns": speed_of(lambda: load_ours(columns=2), size // 2),
        "safetensors.load_file": speed_of(load_safetensors, size),
        "torch.load, mapped": speed_of(load_torch, size),
        "PyTorch DCP": speed_of(load_dcp, size),
    }


def speed_of(load: Callable[[], None], size_bytes: int) -> Measurement:
    def run() -> float:
        started = time.perf_counter()
        load()
        return size_bytes / 1e9 / (time.perf_counter() - started)

    return run
