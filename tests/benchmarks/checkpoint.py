"""Saving a state of about 1 GB beside the ways there are to write it, and how long training waits for a save."""

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
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from llmtrain.checkpoint.fragments import Fragment
from llmtrain.checkpoint.manager import CheckpointManager
from llmtrain.checkpoint.tensor_file import iter_chunks, write_all
from llmtrain.config.schema import CheckpointConfig
from tests.benchmarks.measuring import Measurement, Options, Table, measure

OURS = "llmtrain: save, hashed and synced"
LATER = "llmtrain: asynchronous save, memory kept"
State = dict[str, Tensor]


def benchmark(options: Options) -> list[Table]:
    """Gigabytes per second of synchronous saves; milliseconds of training's stall in an asynchronous one."""
    state = random_state(width=128 if options.quick else 1024)
    gigabytes = sum(tensor.nbytes for tensor in state.values()) / 1e9
    with tempfile.TemporaryDirectory() as folder:
        writers = {name: written_by(write, Path(folder), state) for name, write in ways_to_write(state).items()}
        speeds = measure(writers, options.rounds)
        stalls = measure(ways_to_stall(state, Path(folder)), options.rounds)
    speed_notes = (
        f"{OURS} also writes a manifest and renames; peers sync nothing unless their name says so",
        "llmtrain: bytes only writes the same file without hash and sync",
    )
    return [
        Table(f"Checkpoint of {gigabytes:.2f} GB", "GB/s", "higher", OURS, speeds, speed_notes),
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
        "raw write, synced": lambda path: write_raw(path, state, sync=True),
        "sha256 alone, nothing written": lambda _: hash_only(state),
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
