"""The dry run: where a run would begin and what it would do, as plain numbers, for `llmtrain train --dry-run`.

Opens only the small files of checkpoints, no tensor. Imports no torch.
"""

from dataclasses import dataclass, field
from math import prod

from llmtrain.checkpoint.folders import CHECKPOINTS, STATE
from llmtrain.config.budget import Budget, Seen, seen_by
from llmtrain.config.parameters import declare_parameters, num_active_parameters, num_parameters
from llmtrain.config.patience import Patience, patience_of
from llmtrain.config.schema import RunConfig
from llmtrain.errors import CheckpointError
from llmtrain.files import read_json
from llmtrain.optim.table import row_of
from llmtrain.plan.layout_text import LayoutOutline, plan_layout_outline
from llmtrain.plan.memory import MemoryPlan, plan_memory
from llmtrain.preflight.beginning import run_origin
from llmtrain.preflight.resolve import ResolvedRun
from llmtrain.preflight.source_use import SourceUse, source_uses


@dataclass(frozen=True)
class Continuation:
    """The checkpoint that a run would continue, and the step it was saved after; 0 for imported weights.

    `data_tokens` is what was read up to there, `last_step` where the run would end now.
    `is_own` tells a checkpoint of the run itself from one of another run. Opening it may still find damage: then the
    one before it is taken.
    """

    checkpoint: str
    step: int
    is_own: bool
    data_tokens: int
    last_step: int
    patience: Patience = field(default_factory=Patience)
    """Its evaluations without a better one."""


@dataclass(frozen=True)
class DryRun:
    """Sizes and layout of a run. An interval of 0 means never; the last step is always saved."""

    name: str
    run_folder: str
    parameters: int
    active_parameters: int
    """The parameters that one token meets: of the experts, some."""
    vocab_size: int
    world_size: int
    data_parallel_size: int
    global_batch_size: int
    micro_batch_size: int
    micro_batches_per_rank: int
    seq_len: int
    batch_ramp: tuple[tuple[int, int], ...]
    """Steps from which on the batch has another size, and that size."""
    tokens_per_step: int
    steps: int
    tokens: int
    precision: str
    engine: str
    zero_stage: int
    evaluate_every_steps: int
    tasks: tuple[str, ...]
    tasks_every_steps: int
    checkpoint_every_steps: int
    windows: str | None
    sources: tuple[SourceUse, ...]
    checkpoint_bytes: int
    memory: MemoryPlan
    continues: Continuation | None
    metric: str
    stop_after: int | None
    stopped_early: bool
    """What it would continue has ended before its last step, and would again."""
    context_exchange: str | None
    """How context ranks attend to each other's positions; None where there is one."""
    layout: LayoutOutline


def damaged_checkpoints(config: RunConfig) -> list[str]:
    """The faults of checkpoints that a run would pass over for an older one, as their small files tell."""
    damaged = list[str]()
    run_origin(config, damaged)
    return damaged


def find_continuation(config: RunConfig) -> Continuation | None:
    """None where the run begins at its first step, with nothing to begin from.

    Raises CheckpointError where the checkpoint does not say after which step it was saved.
    """
    origin = run_origin(config)
    if origin is None:
        return None
    try:
        state = read_json(origin.path / STATE)
        seen = seen_by(state["train"], origin.config) if origin.trained else Seen()
        patience = patience_of(state["train"]) if origin.trained else Patience()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{origin.path / STATE}: does not say how far training was: {error!r}") from error
    own = config.run_dir / CHECKPOINTS
    is_own, last_step = origin.path.resolve().parent == own.resolve(), Budget.of(config).last_step(seen)
    return Continuation(str(origin.path), seen.step, is_own, seen.data_tokens, last_step, patience)


def plan_dry_run(resolved: ResolvedRun, continues: Continuation | None = None) -> DryRun:
    """The sizes of a run that keeps the arithmetic rules, and what it makes of its data."""
    config, train, layout = resolved.config, resolved.config.train, resolved.layout
    sizes = train.batch_sizes.scaled(config.data.seq_len)
    early = bool(continues and resolved.early_stop and resolved.early_stop.is_over(continues.patience))
    steps = continues.last_step if continues else config.total_steps
    before, done = (continues.data_tokens, continues.step) if continues else (0, 0)
    declared = declare_parameters(config.model, config.finetune).items()
    # With the padding of the vocabulary: checkpoints hold it.
    trained = sum(prod(parameter.shape) for name, parameter in declared if name not in config.frozen)
    return DryRun(
        name=config.name,
        run_folder=str(resolved.run_dir),
        parameters=num_parameters(config.model),
        active_parameters=num_active_parameters(config.model),
        vocab_size=config.model.vocabulary,
        world_size=layout.world_size,
        data_parallel_size=layout.data,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        micro_batches_per_rank=train.global_batch_size // (train.micro_batch_size * layout.data),
        seq_len=config.data.seq_len,
        batch_ramp=tuple((change.from_step, change.global_batch_size) for change in train.batch_ramp),
        tokens_per_step=train.global_batch_size * config.data.seq_len,
        steps=steps,
        tokens=before + sizes.before(max(steps, done) + 1) - sizes.before(done + 1),
        precision=train.precision,
        engine=config.engine.name,
        zero_stage=config.engine.zero_stage,
        evaluate_every_steps=config.evaluate.every_steps,
        tasks=tuple(task.name for task in resolved.tasks),
        tasks_every_steps=config.evaluate.tasks_every_steps,
        checkpoint_every_steps=config.checkpoint.every_steps,
        windows=config.data.windows,
        sources=tuple(source_uses(resolved)),
        checkpoint_bytes=row_of(config.optim).stored_bytes * trained,
        memory=plan_memory(config, layout, resolved.lengths),
        continues=continues,
        metric=config.evaluate.metric,
        stop_after=config.evaluate.stop_after,
        stopped_early=early,
        context_exchange=config.context_exchange if layout.context > 1 else None,
        layout=plan_layout_outline(layout, config.model.total_layers, config.parallel.pipeline_split),
    )
