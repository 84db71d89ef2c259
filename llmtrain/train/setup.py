"""From a resolved run to its parts: loader, engine, monitor, evaluation, checkpoints."""

import logging
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, Literal

import torch

from llmtrain.config.engines import ENGINES
from llmtrain.data.loader import BatchLoader, build_stream
from llmtrain.data.row_config import build_row_config
from llmtrain.engines.tensor_norms import measuring
from llmtrain.preflight.resolve import ResolvedRun
from llmtrain.runs.audit import StartedAttempt
from llmtrain.runs.folder import RunFolder
from llmtrain.train.health import Health
from llmtrain.train.loop import Evaluation, Run
from llmtrain.train.recording import build_monitor, profiled
from llmtrain.train.rollback import Rollbacks
from llmtrain.train.start import Start, record_start
from llmtrain.train.state import Saving, begin
from llmtrain.train.tasks import build_tasks
from llmtrain.values.progress import Phase

_logger = logging.getLogger(__name__)


def engine_class(name: str) -> Any:
    """Import an engine."""
    row = ENGINES[name]
    return getattr(import_module(row.module), row.class_name)


def setup(
    resolved: ResolvedRun,
    folder: RunFolder | None,
    start: Start,
    device: torch.device,
    rank: int = 0,
    on_phase: Callable[[Phase, int], None] = lambda phase, step: None,
) -> Run:
    """Build the parts of a run on one of its launch.num_workers ranks.

    Rank 0 holds the lock of the run folder and records the run; the others have no `folder`. The vocabulary size is
    known, and where there are several ranks, torch.distributed is initialized. `on_phase` hears where this rank is.
    """
    torch.set_float32_matmul_precision("highest")  # whatever a library has set: TF32 is not fp32
    config = resolved.config
    # Before the engine is built: an attempt that fails while it builds is one, and its folder says what it was.
    attempt = record_start(resolved, folder, start) if folder else StartedAttempt()
    engine = engine_class(config.engine.name)(config, device)
    state = begin(start.checkpoint, engine, resolved)
    if start.teacher is not None:
        engine.teacher.load(start.teacher)
    # After the restoring: what measures stands around the engine, and holds nothing that is saved.
    engine = measuring(engine, config)
    # The monitor is made with whoever hears of phases, and tells what they have to say.
    on_phase = profiled(config, rank, on_phase, lambda text: (monitor.say if folder else _logger.info)(text))
    monitor = build_monitor(resolved, folder, state, device, attempt, on_phase)
    start.manager.reports.warn = monitor.say  # lines above the progress bar from here on, not through it
    saving = Saving(start.manager, config.checkpoint.every_steps, monitor.flush)
    evaluation = Evaluation(
        build_loader(resolved, "valid", rank, once=True) if config.data.valid else None,
        config.evaluate.every_steps,
        config.evaluate.steps,
        config.checkpoint.keep_best,
        resolved.early_stop,
    )
    tasks = build_tasks(resolved, start, rank)
    log = start.manager.reports.record if folder else lambda event, **facts: None
    report = partial(setattr, folder, "verdict") if folder else lambda verdict: None
    health = Health(config.health, config.optim.loss_scale.minimum, log, monitor.say, report)
    rollbacks = Rollbacks(config.health, start.manager, folder.path if folder else None, start.ranks, log, monitor.say)
    loader = build_loader(resolved, "train", rank).skipping(start.skipped).sized(config.train.batch_sizes)
    return Run(loader, engine, monitor, evaluation, tasks, saving, health, rollbacks, state, config)


def build_loader(
    resolved: ResolvedRun, split: Literal["train", "valid"], rank: int = 0, once: bool = False
) -> BatchLoader:
    """The micro-batches of a rank: those of its place on the data axis. With `once`, data that ends is followed by
    samples without targets."""
    config, layout = resolved.config, resolved.layout
    sources, manifests = {
        "train": (config.data.train, resolved.train),
        "valid": (config.data.valid, resolved.valid),
    }[split]
    stream = build_stream(sources, config.data, config.seed, resolved.run_dir, once, manifests)
    row_config = build_row_config(config, stream, lambda: resolved.tokenizer, trained=split == "train")
    sizes = (config.train.global_batch_size, config.train.micro_batch_size)
    return BatchLoader(stream, row_config, *sizes, layout.coordinates(rank).data, layout.data)
