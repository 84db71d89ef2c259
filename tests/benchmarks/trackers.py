"""What Weights & Biases adds to a step: off, offline, and online where its server cannot be reached."""

import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from itertools import count
from pathlib import Path
from time import process_time

from llmtrain.config.schema import ObserveConfig, RunConfig
from llmtrain.preflight.resolve import resolve
from llmtrain.runs.folder import RunFolder
from llmtrain.train.loop import train
from llmtrain.train.setup import setup
from llmtrain.train.start import find_start
from tests.benchmarks.data_sets import write_text_data_set
from tests.benchmarks.measuring import Measurement, Options, Table, measure, one_torch_thread
from tests.benchmarks.overhead import CPU, median_step, run_config
from tests.benchmarks.peer_models import Shape

SHAPE = Shape(num_layers=2, hidden_size=128, num_heads=4, vocab_size=512, seq_len=128, batch_size=4)
"""A step of some tens of milliseconds, every one of which is recorded: far more often than a large run records."""

UNREACHABLE = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a" * 40}
OFF, OFFLINE, ONLINE = "off", "offline", "online, server unreachable"


def benchmark(options: Options) -> list[Table]:
    """CPU milliseconds per step of the training process, its threads included, with one thread of PyTorch."""
    steps = 20 if options.quick else 600  # the server is waited for behind training while these run
    with tempfile.TemporaryDirectory() as folder, one_torch_thread(), environment(UNREACHABLE):
        root = Path(folder)
        split = write_text_data_set(root, SHAPE.vocab_size, num_documents=40)
        config = run_config(split, root / "runs", steps, SHAPE)
        modes = {OFF: "off", OFFLINE: "offline", ONLINE: "online"}
        if options.quick:
            del modes[ONLINE]  # it waits for the server for longer than such a run takes
        contenders = {name: run_of(config, mode) for name, mode in modes.items()}
        rows = {row.name: row for row in measure(contenders, options.rounds)}
    note = (
        "the median step of each run, in CPU time: walls of neighbouring runs differ by more than a factor of two on a "
        "busy machine; every step is recorded; TensorBoard is off; W&B's own process is not counted"
    )
    return [Table("Weights & Biases", "CPU ms/step", "lower", OFF, tuple(rows.values()), (note,))]


def run_of(config: RunConfig, mode: str) -> Measurement:
    """A run through set-up and loop in a fresh folder."""
    observe = ObserveConfig.model_validate({"wandb": mode, "tensorboard": False})
    numbers = count()

    def measured() -> float:
        fresh = config.with_keys({"name": f"{mode}-{next(numbers)}", "observe": observe})
        times: list[float] = []

        def note_the_time() -> bool:  # asked once per step
            times.append(process_time())
            return False

        with RunFolder(fresh.run_dir) as folder, redirect_stderr(io.StringIO()):
            run = setup(resolve(fresh), folder, find_start(resolve(fresh), folder), CPU)
            train(run, note_the_time)
            run.monitor.close("done")
        return median_step(times) / 1e3

    return measured


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """These variables in the environment of this process."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
