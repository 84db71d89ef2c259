"""What a run will do, as plain numbers: the answer of `llmtrain train --dry-run`. Pure arithmetic, no torch."""

from dataclasses import dataclass
from math import prod

from llmtrain.config.parameters import declare_parameters, is_frozen, num_active_parameters, num_parameters
from llmtrain.config.schema import RunConfig
from llmtrain.optim.table import row_of
from llmtrain.plan.layout_text import LayoutOutline, plan_layout_outline
from llmtrain.plan.memory import MemoryPlan, plan_memory
from llmtrain.preflight.continuation import Continuation
from llmtrain.preflight.resolve import ResolvedRun
from llmtrain.preflight.source_use import SourceUse, source_uses


@dataclass(frozen=True)
class Outline:
    """Sizes and layout of a run. An interval of 0 means never; the last step is always saved."""

    name: str
    run_folder: str
    parameters: int
    active_parameters: int
    """Those that one token meets: of the experts, some."""
    vocab_size: int
    world_size: int
    data_parallel_size: int
    global_batch_size: int
    micro_batch_size: int
    micro_batches_per_rank: int
    seq_len: int
    tokens_per_step: int
    steps: int
    tokens: int
    precision: str
    engine: str
    zero_stage: int
    evaluate_every_steps: int
    checkpoint_every_steps: int
    windows: str | None
    sources: tuple[SourceUse, ...]
    checkpoint_bytes: int
    memory: MemoryPlan
    continues: Continuation | None
    layout: LayoutOutline


def plan_outline(resolved: ResolvedRun, continues: Continuation | None = None) -> Outline:
    """The sizes of a run that keeps the arithmetic rules, and what it makes of its data."""
    config, train, layout = resolved.config, resolved.config.train, resolved.layout
    tokens_per_step = train.global_batch_size * config.data.seq_len
    steps = continues.last_step if continues else config.total_steps
    before, ahead = (continues.data_tokens, steps - continues.step) if continues else (0, steps)
    return Outline(
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
        tokens_per_step=tokens_per_step,
        steps=steps,
        tokens=before + max(0, ahead) * tokens_per_step,
        precision=train.precision,
        engine=config.engine.name,
        zero_stage=config.engine.zero_stage,
        evaluate_every_steps=config.evaluate.every_steps,
        checkpoint_every_steps=config.checkpoint.every_steps,
        windows=config.data.windows,
        sources=tuple(source_uses(resolved)),
        checkpoint_bytes=_checkpoint_bytes(config),
        memory=plan_memory(config, layout, resolved.lengths),
        continues=continues,
        layout=plan_layout_outline(layout, config.model.total_layers, config.parallel.pipeline_split),
    )


def _checkpoint_bytes(config: RunConfig) -> int:
    """Masters and moments of what is trained, padding of the vocabulary included."""
    declared = declare_parameters(config.model).items()
    trained = sum(prod(parameter.shape) for name, parameter in declared if not is_frozen(name, config.optim.freeze))
    return row_of(config.optim).stored_bytes * trained
