"""What a step costs beside its arithmetic: the whole loop on a tiny model beside a bare loop of the same model."""

import io
import tempfile
import time
from contextlib import redirect_stderr
from itertools import count, cycle, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from llmtrain.config.schema import ObserveConfig, RunConfig
from llmtrain.engines.torch_engine import TorchEngine
from llmtrain.models.transformer import build_model
from llmtrain.preflight.resolve import resolve
from llmtrain.runs.folder import RunFolder
from llmtrain.train.loop import train
from llmtrain.train.setup import build_loader, setup
from llmtrain.train.start import find_start
from llmtrain.values.batch import Batch
from tests.benchmarks.data_sets import write_text_data_set
from tests.benchmarks.measuring import Measurement, Options, Table, measure, one_torch_thread
from tests.benchmarks.peer_models import Shape
from tests.benchmarks.step import gpt2_run
from tests.support.weights import materialize

SHAPE = Shape(num_layers=1, hidden_size=32, num_heads=2, vocab_size=512, seq_len=16, batch_size=4)
"""So small that a step takes about a millisecond, most of it PyTorch's own cost per operation."""

CPU = torch.device("cpu")
OURS, BARE, ENGINE, DEFAULTS = "loop, trackers off", "bare loop", "engine alone", "loop, default trackers"


def benchmark(options: Options) -> list[Table]:
    """Microseconds per step in one PyTorch thread on the CPU, and what each part adds to the bare loop."""
    steps = 20 if options.quick else 1000
    with tempfile.TemporaryDirectory() as folder, one_torch_thread():
        root = Path(folder)
        train_split = write_text_data_set(root, SHAPE.vocab_size, num_documents=40)
        config = run_config(train_split, root / "runs", steps)
        batches = loaded_batches(config, 64)
        contenders: dict[str, Measurement] = {
            OURS: whole_loop(config, "off"),
            BARE: bare_loop(config, batches, steps),
            ENGINE: engine_alone(config, batches, steps),
            DEFAULTS: whole_loop(config, "default"),
        }
        rows = {row.name: row for row in measure(contenders, options.rounds)}
    added = tuple(rows[name].minus(rows[BARE], f"{name}: added to the bare loop") for name in (ENGINE, OURS, DEFAULTS))
    note = (
        "trackers off: metrics.jsonl, status.json and the console stay on, as in every run; defaults add TensorBoard "
        "and offline Weights & Biases. Every step is logged. The loader runs in its thread."
    )
    title = f"Overhead per step (1 layer, {SHAPE.hidden_size} wide, {SHAPE.tokens_per_step} tokens a step)"
    return [
        Table(title, "us/step", "lower", OURS, tuple(rows.values()), (note,)),
        Table(f"{title}, differences within a round", "us/step", "lower", None, added),
    ]


def run_config(train_split: Path, output_dir: Path, steps: int, shape: Shape = SHAPE) -> RunConfig:
    """The tiny run on a data set. A run's one save lies behind its last step, where no clock runs."""
    changes = {
        "data": {"train": [{"path": str(train_split)}]},
        "train": {"steps": steps},
        "checkpoint": {"every_steps": 0},
    }
    return gpt2_run(shape, changes).with_keys({"output_dir": str(output_dir)})


def loaded_batches(config: RunConfig, number: int) -> list[Batch]:
    """The first steps' batches, for contenders that have no loader."""
    steps = build_loader(resolve(config), "train").steps(first_sample=0)
    batches = [next(steps)[0] for _ in range(number)]
    steps.close()
    return batches


def median_step(times: list[float]) -> float:
    """Microseconds from the end of one step to that of the next, the first tenth left out.

    The median, not the mean: another process that takes the core for some milliseconds would be counted as overhead.
    What happens in few steps only, such as the status file that is written once a second, does not show.
    """
    settled = times[len(times) // 10 :]
    return 1e6 * median(after - before for before, after in pairwise(settled))


def whole_loop(config: RunConfig, trackers: str) -> Measurement:
    """A run through set-up and loop in a fresh folder."""
    numbers = count()
    off = ObserveConfig.model_validate({"wandb": "off", "tensorboard": False})
    observe: dict[str, Any] = {"observe": off} if trackers == "off" else {}

    def run() -> float:
        fresh = config.with_keys({"name": f"{trackers}-{next(numbers)}", **observe})
        times: list[float] = []

        def note_the_time() -> bool:  # asked once per step, after everything but a checkpoint
            times.append(time.perf_counter())
            return False

        path = fresh.run_dir
        with RunFolder(path) as folder, redirect_stderr(io.StringIO()):  # progress lines, not a terminal's bar
            run = setup(resolve(fresh), folder, find_start(resolve(fresh), folder), CPU)
            train(run, note_the_time)
            run.monitor.close("done")
        return median_step(times)

    return run


def bare_loop(config: RunConfig, batches: list[Batch], steps: int) -> Measurement:
    """The same model, clipping and optimizer with PyTorch's own loss, and nothing else."""
    model = build_model(config.model)
    materialize(model, config.seed, CPU)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim.lr, fused=True)
    supply = cycle(batches)

    def run() -> float:
        times = [time.perf_counter()]
        for _ in range(steps):
            batch = next(supply)
            hidden, _ = model(batch)
            loss = F.cross_entropy(model.logits(hidden).flatten(0, 1), batch.labels_BS.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()
            times.append(time.perf_counter())
        return median_step(times)

    return run


def engine_alone(config: RunConfig, batches: list[Batch], steps: int) -> Measurement:
    """The engine's step on batches that are there already."""
    engine = TorchEngine(config, CPU)
    supply = cycle(batches)
    numbers = count(1)

    def run() -> float:
        times = [time.perf_counter()]
        for _ in range(steps):
            engine.train_step(next(numbers), [next(supply)], config.optim.lr)
            times.append(time.perf_counter())
        return median_step(times)

    return run
