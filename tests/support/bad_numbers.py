"""Whole runs on forked ranks whose numbers go bad on purpose: one function that a rank runs, and what it saw."""

import json
import math
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launch.rank.rendezvous import TorchRankStore, anybody
from llmtrain.checks.parity.compare import Pieces, pieces
from llmtrain.config.data import DataConfig, SourceConfig
from llmtrain.config.schema import (
    CheckpointConfig,
    EngineConfig,
    HealthConfig,
    LaunchConfig,
    ObserveConfig,
    ParallelConfig,
    RunConfig,
)
from llmtrain.data.objectives import table
from llmtrain.data.objectives.causal import PackedSample
from llmtrain.data.row_config import RowConfig
from llmtrain.data.stream import Sample
from llmtrain.errors import LlmtrainError
from llmtrain.models import head
from llmtrain.preflight.resolve import resolve
from llmtrain.runs.folder import RunFolder
from llmtrain.train import rollback, setup
from llmtrain.train import start as beginning
from llmtrain.train.loop import Run, train
from llmtrain.values.batch import Batch
from llmtrain.values.progress import StepResult
from tests.support.samples import tiny_model, tiny_run

BATCH = 4
POISON = 0
"""A label that no data has: where it stands, the loss is not a number, and so is every gradient."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong. Samples in `poisoned` never give a finite loss; in `flicker` the last rank's first attempt at
    that step does not; in `loud` the learning rate is a thousandfold, once in a run's life. `killed` ends all ranks:
    with "recorded" when a rollback is in the audit log and nothing else is done, with a number when that many steps
    have been done since it. `mutation` breaks what is tested."""

    poisoned: tuple[int, ...] = ()
    flicker: int = 0
    loud: int = 0
    killed: str | int = ""
    mutation: str = ""


@dataclass
class Seen:
    """What a rank saw: every call of the engine, in order, and its part of the state at the end.

    A call is (step, the samples of this rank's part of the batch, result). `touched` are the steps that were skipped
    and changed weights, moments or counts all the same.
    """

    calls: list[tuple[int, list[int], StepResult]] = field(default_factory=list)
    touched: list[int] = field(default_factory=list)
    final: Pieces = field(default_factory=list)
    error: tuple[str, str] | None = None

    @property
    def samples(self) -> dict[int, list[int]]:
        """Of each step that counts, this rank's samples: a step that was done again replaces those from it on."""
        kept: dict[int, list[int]] = {}
        for step, samples, _ in self.calls:
            kept = {earlier: taken for earlier, taken in kept.items() if earlier < step}
            kept[step] = samples
        return kept


def bad_run(folder: Path, layout: tuple[str, int, dict[str, Any]], steps: int, **health: Any) -> RunConfig:
    """A run on the data in `folder`, in the layout (engine and ZeRO stage, ranks, sizes of axes). A micro-batch is one
    sample."""
    engine, world_size, parallel = layout
    name, _, stage = engine.partition("-")
    train = {"steps": steps, "global_batch_size": BATCH, "micro_batch_size": 1}
    config = tiny_run(tiny_model(dropout=0.1), train, {"lr": 1e-2, "schedule": "constant"})
    return config.with_keys(
        {
            "name": "bad",
            "output_dir": str(folder / "runs"),
            "data": DataConfig(train=(SourceConfig(path=str(folder / "data")),), seq_len=32),
            "engine": EngineConfig.model_validate({"name": name, "zero_stage": int(stage or 0)}),
            "parallel": ParallelConfig(**parallel),
            "checkpoint": CheckpointConfig(every_steps=4),
            "health": HealthConfig(**health),
            "observe": ObserveConfig(wandb="off", tensorboard=False),
            "launch": LaunchConfig(num_workers=world_size, threads_per_worker=1, device="cpu"),
        }
    )


def run_rank(rank: int, world_size: int, config: RunConfig, fault: Fault) -> Seen:
    """Begin or continue a run on one rank, as launch/rank/worker.py does, with a fault."""
    resolved, run_dir = resolve(config), config.run_dir
    store = dist.PrefixStore("said", dist.distributed_c10d._get_default_store())  # pyright: ignore
    ranks = TorchRankStore(store, rank, world_size, 60.0)
    _break(fault.mutation)
    seen = Seen()
    folder = RunFolder(run_dir) if rank == 0 else None
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    try:
        if folder:
            start = beginning.find_start(resolved, folder, ranks)
            ranks.put("start", json.dumps(beginning.describe_start(start)))
        else:
            start = beginning.join_start(resolved, json.loads(ranks.get("start")), ranks)
        run = setup.setup(resolved, folder, start, torch.device("cpu"), rank)
        _spoil(fault, run, seen, run_dir)
        try:
            train(run, lambda: False, anybody)
        except LlmtrainError as error:
            seen.error = (type(error).__name__, str(error))
        run.monitor.close("done")
        seen.final = pieces(run.engine.fragments())
    finally:
        if folder:
            folder.close()
    return seen


def _spoil(fault: Fault, run: Run, seen: Seen, run_dir: Path) -> None:
    """Put the fault into this process, and write down what the engine is asked for."""
    engine = run.engine
    _poison(set(fault.poisoned))
    marker = run_dir / "was-loud"
    now = {"flickers": False, "loud": not marker.exists(), "since": 0}
    chunk_loss, train_step = head.chunk_loss, engine.train_step
    restore, record = rollback.restore, run.rollbacks.record

    def spoiled_loss(hidden: Tensor, weight: Any, targets: head.HeadTargets, objective: Any, grads: Any) -> Tensor:
        loss = chunk_loss(hidden, weight, targets, objective, grads)
        if not now["flickers"] and not bool((targets.labels_T == POISON).any()):
            return loss
        if grads is not None:
            grads.hidden_CH.mul_(math.nan)
            grads.weight_VH.mul_(math.nan)
        return loss * math.nan

    def seen_step(step: int, micro_batches: list[Batch], lr: float) -> StepResult:
        first = all(done != step for done, _, _ in seen.calls)
        now["flickers"] = step == fault.flicker and first and dist.get_rank() == dist.get_world_size() - 1
        if step == fault.loud and now["loud"]:
            now["loud"], lr = False, 1000 * lr
            marker.touch()
        before = pieces(engine.fragments()), engine.state()
        result = train_step(step, micro_batches, lr)
        now["flickers"] = False
        seen.calls.append((step, [batch.first_sample for batch in micro_batches], result))
        if result.skipped and not (same(before[0], pieces(engine.fragments())) and before[1] == engine.state()):
            seen.touched.append(step)
        if now["since"]:
            now["since"] += 1
            if now["since"] > 1 and now["since"] - 1 == fault.killed:
                os.kill(os.getpid(), signal.SIGKILL)
        return result

    def killing_record(event: str, **facts: Any) -> None:
        record(event, **facts)
        if event == rollback.ROLLBACK and fault.killed == "recorded":
            os.kill(os.getpid(), signal.SIGKILL)

    def counting_restore(checkpoint: Any, engine: Any) -> Any:
        now["since"] = 1
        return restore(checkpoint, engine)

    head.chunk_loss, run.engine.train_step = spoiled_loss, seen_step  # type: ignore[method-assign]
    rollback.restore, run.rollbacks.record = counting_restore, killing_record


def _poison(numbers: set[int]) -> None:
    causal = table.OBJECTIVES["causal"]

    def poisoned(sample: Sample, row_config: RowConfig) -> PackedSample:
        packed = causal(sample, row_config)
        if sample.number in numbers:
            packed.labels_S[:] = POISON
        return packed

    table.OBJECTIVES["causal"] = poisoned


def _break(mutation: str) -> None:
    """Break what a test is about."""
    if mutation == "windows are forgotten":
        beginning.skipped_windows = lambda run_dir: ()
    elif mutation == "checkpoints with skipped data count":
        beginning.newest_kept = lambda manager, skipped: manager.newest_valid()
    elif mutation == "the second attempt draws anew":
        from llmtrain.engines import torch_engine
        from llmtrain.parallel.stateless_random import Draws

        attempts = iter(range(10**6))
        build = Draws.of_micro_batch
        torch_engine.Draws = type(
            "Draws", (), {"of_micro_batch": staticmethod(lambda seed, *rest: build(seed + next(attempts), *rest))}
        )
    else:
        assert not mutation, mutation


def same(a: Pieces, b: Pieces) -> bool:
    """Whether two ranks' states are equal, bit for bit."""
    return [(name, shape, box) for name, shape, box, _ in a] == [
        (name, shape, box) for name, shape, box, _ in b
    ] and all(x.tobytes() == y.tobytes() for (*_, x), (*_, y) in zip(a, b, strict=True))


def finite(state: Pieces) -> bool:
    return all(bool(math.isfinite(float(abs(data).max(initial=0.0)))) for *_, data in state)


def consumed(ranks: list[Seen]) -> dict[int, list[int]]:
    """The samples of each step that counts, over all ranks, each once however many ranks share it."""
    steps = ranks[0].samples.keys()
    return {step: sorted({number for seen in ranks for number in seen.samples.get(step, [])}) for step in steps}
