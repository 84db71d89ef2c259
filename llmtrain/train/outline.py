"""What a run will do, as plain numbers: the answer of `llmtrain train --dry-run`. Pure arithmetic, no torch."""

from dataclasses import dataclass

from llmtrain.config.schema import RunConfig
from llmtrain.config.sizes import num_parameters


@dataclass(frozen=True)
class Outline:
    """Sizes of a run. An interval of 0 means never; the last step is always saved."""

    name: str
    run_folder: str
    parameters: int
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
    evaluate_every_steps: int
    checkpoint_every_steps: int


def plan_outline(config: RunConfig, world_size: int) -> Outline:
    """The sizes of a run whose vocabulary is known and that keeps the arithmetic rules."""
    train, parallel = config.train, config.parallel
    data_parallel = world_size // (parallel.tensor * parallel.pipeline * parallel.context)
    tokens_per_step = train.global_batch_size * config.data.seq_len
    return Outline(
        name=config.name,
        run_folder=f"{config.output_dir.rstrip('/') or '/'}/{config.name}",
        parameters=num_parameters(config.model),
        vocab_size=config.model.vocabulary,
        world_size=world_size,
        data_parallel_size=data_parallel,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        micro_batches_per_rank=train.global_batch_size // (train.micro_batch_size * data_parallel),
        seq_len=config.data.seq_len,
        tokens_per_step=tokens_per_step,
        steps=config.total_steps,
        tokens=config.total_steps * tokens_per_step,
        precision=train.precision,
        evaluate_every_steps=config.evaluate.every_steps,
        checkpoint_every_steps=config.checkpoint.every_steps,
    )
