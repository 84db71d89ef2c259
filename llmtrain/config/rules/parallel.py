"""Rules about the axes of the mesh, which divide heads, widths, layers, sequences, ranks and batches. Pure."""

from collections.abc import Iterator
from math import gcd
from typing import Protocol

from llmtrain.config.attention import kind_of
from llmtrain.config.model import VOCAB_MULTIPLE, ModelConfig
from llmtrain.config.reading.suggestions import either, nearest_divisors, nearest_multiples
from llmtrain.config.rules.objective import axes_divide_sequences
from llmtrain.config.schema import ParallelConfig, RunConfig
from llmtrain.errors import Problem

MESH_AXES = ("tensor", "pipeline", "context")
"""The axes that a rank has a place on beside data parallel; expert parallel lies within data and context."""

AXIS_KEYS = tuple(f"parallel.{axis}" for axis in MESH_AXES)

LAYER_KEYS = ("model.num_layers", "model.num_encoder_layers", "model.family")

Found = Iterator[Problem]


class ModelOnRanks(Protocol):
    """A model, and the axes over which ranks hold it."""

    @property
    def model(self) -> ModelConfig: ...

    @property
    def parallel(self) -> ParallelConfig: ...


def tensor_divides_layers(config: ModelOnRanks) -> Found:
    """Each tensor rank has whole heads and an equal part of the MLP and of the vocabulary."""
    model, tensor = config.model, config.parallel.tensor
    sizes = {
        "model.num_heads": model.num_heads,
        "model.num_kv_heads": model.kv_heads,
        "the vocabulary's padding": VOCAB_MULTIPLE,
    }
    # Where all layers have experts of a width of their own, no layer has the model's.
    if model.has_plain_mlp or (model.moe is not None and model.moe.ffn_hidden_size is None):
        sizes["model.ffn_hidden_size"] = model.ffn_size
    undivided = {name: size for name, size in sizes.items() if size % tensor}
    if not undivided:
        return
    names = " and ".join(f"{name} = {size}" for name, size in undivided.items())
    common = gcd(*sizes.values())
    message = f"must divide {names}. Try {either(nearest_divisors(common, tensor))}."
    uses = (*(name for name in undivided if "." in name), "model.hidden_size")
    yield Problem("parallel.tensor", message, tensor, uses=uses)


def context_divides_heads(config: RunConfig) -> Found:
    heads, tensor, context = config.model.num_heads, config.parallel.tensor, config.parallel.context
    if config.context_exchange == "heads" and heads % tensor == 0 and heads // tensor % context:
        of_rank = f"model.num_heads / parallel.tensor = {heads} / {tensor} = {heads // tensor}"
        tries = either(nearest_divisors(heads // tensor, context))
        no_ring = kind_of(config.model.attention).no_ring
        other = "" if no_ring else ", or parallel.context_exchange=ring"
        message = f"each rank attends with some of the heads: must divide {of_rank}. Try {tries}{other}."
        uses = ("model.num_heads", "parallel.tensor", "parallel.context_exchange", "model.attention.kind")
        yield Problem("parallel.context", message, context, uses=uses)


def exchange_needs_context(config: RunConfig) -> Found:
    exchange = config.parallel.context_exchange
    if exchange is not None and config.parallel.context == 1:
        message = "needs parallel.context greater than 1. Try null."
        yield Problem("parallel.context_exchange", message, exchange, uses=("parallel.context",))


def ring_joins_softmaxes(config: RunConfig) -> Found:
    """Parts of a softmax over some of the keys each can be joined by their sums; other weights need all at once."""
    kind, exchange = config.model.attention.kind, config.parallel.context_exchange
    no_ring = kind_of(config.model.attention).no_ring
    if exchange == "ring" and config.parallel.context > 1 and no_ring:
        message = f"model.attention.kind = {kind} {no_ring}. Try heads."
        yield Problem("parallel.context_exchange", message, exchange, uses=("model.attention.kind",))


def sequence_needs_tensor(config: RunConfig) -> Found:
    if config.parallel.sequence and config.parallel.tensor == 1:
        message = "needs parallel.tensor greater than 1. Try false."
        yield Problem("parallel.sequence", message, "true", uses=("parallel.tensor",))


def chunks_need_pipeline(config: RunConfig) -> Found:
    parallel = config.parallel
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        message = "needs parallel.pipeline greater than 1. Try 1."
        yield Problem("parallel.virtual_pipeline", message, parallel.virtual_pipeline, uses=("parallel.pipeline",))


def schedule_has_stages(config: RunConfig) -> Found:
    parallel = config.parallel
    if parallel.pipeline_schedule is None:
        return
    if parallel.pipeline == 1:
        message = "orders the work of pipeline stages, and parallel.pipeline = 1. Try null, or parallel.pipeline=2."
        yield Problem("parallel.pipeline_schedule", message, parallel.pipeline_schedule, uses=("parallel.pipeline",))
    elif parallel.virtual_pipeline > 1:
        message = (
            f"orders one chunk per stage, and parallel.virtual_pipeline = {parallel.virtual_pipeline}. "
            "Try null, or parallel.virtual_pipeline=1."
        )
        uses = ("parallel.virtual_pipeline",)
        yield Problem("parallel.pipeline_schedule", message, parallel.pipeline_schedule, uses=uses)


def pipeline_has_layers(config: ModelOnRanks) -> Found:
    """Every chunk has a layer, where no split says otherwise."""
    parallel, layers = config.parallel, config.model.total_layers
    if parallel.pipeline_split is not None:
        return
    if parallel.pipeline > layers:
        message = f"must be at most {_layers_text(config)}. Try {layers}."
        yield Problem("parallel.pipeline", message, parallel.pipeline, uses=LAYER_KEYS)
    elif parallel.pipeline * parallel.virtual_pipeline > layers:
        most = layers // parallel.pipeline
        message = (
            f"with parallel.pipeline = {parallel.pipeline} gives {parallel.pipeline * parallel.virtual_pipeline} "
            f"chunks for {_layers_text(config)}. Try {most}{' or less' if most > 1 else ''}."
        )
        uses = ("parallel.pipeline", *LAYER_KEYS)
        yield Problem("parallel.virtual_pipeline", message, parallel.virtual_pipeline, uses=uses)


def split_names_every_layer(config: ModelOnRanks) -> Found:
    parallel, layers = config.parallel, config.model.total_layers
    split, chunks = parallel.pipeline_split, parallel.pipeline * parallel.virtual_pipeline
    if split is None:
        return
    faults = []
    if len(split) != chunks:
        sizes = f"parallel.pipeline x parallel.virtual_pipeline = {parallel.pipeline} x {parallel.virtual_pipeline}"
        faults.append(f"must have {chunks} entries, one per chunk ({sizes})")
    if sum(split) != layers:
        faults.append(f"must sum to {_layers_text(config)}, and sums to {sum(split)}")
    if 0 in split[1:-1]:
        faults.append("only the first and the last chunk, which hold embeddings and head, may have no layer")
    if faults:
        equal = (
            [layers // chunks + (number < layers % chunks) for number in range(chunks)] if chunks <= layers else None
        )
        advice = f"Try {equal}, or null." if equal and chunks <= 64 else "Try null."
        uses = ("parallel.pipeline", "parallel.virtual_pipeline", *LAYER_KEYS)
        yield Problem("parallel.pipeline_split", f"{'; '.join(faults)}. {advice}", list(split), uses=uses)


def _layers_text(config: ModelOnRanks) -> str:
    model = config.model
    if model.family != "encoder_decoder":
        return f"model.num_layers = {model.num_layers}"
    sizes = f"{model.encoder_layers} + {model.decoder_layers} = {model.total_layers}"
    return f"model.num_encoder_layers + model.num_layers = {sizes}"


def expert_divides_replicas(config: RunConfig, world_size: int) -> Found:
    """Experts are spread over ranks that hold the same part of everything else."""
    parallel = config.parallel
    if world_size % parallel.replica_size:
        return
    replicas = world_size // (parallel.tensor * parallel.pipeline)
    if replicas % parallel.expert:
        data = world_size // parallel.replica_size
        tries = either(nearest_divisors(replicas, parallel.expert))
        message = f"must divide data parallel size x context = {data} x {parallel.context} = {replicas}. Try {tries}."
        yield Problem("parallel.expert", message, parallel.expert, uses=("launch.num_workers", *AXIS_KEYS))


def axes_divide_world(config: RunConfig, world_size: int) -> Found:
    replica = config.parallel.replica_size
    if world_size % replica == 0:
        return
    sizes = " x ".join(f"{axis} {getattr(config.parallel, axis)}" for axis in MESH_AXES)
    advice = f"Try {either(nearest_multiples(replica, world_size))}"
    other = _fitting_axis(config, world_size)
    message = f"parallel needs a multiple of {sizes} = {replica} ranks. {advice}{f', or {other}' if other else ''}."
    yield Problem("launch.num_workers", message, world_size, uses=AXIS_KEYS)


def _fitting_axis(config: RunConfig, world_size: int) -> str | None:
    """One axis changed, as little as can be, so that the ranks suffice and no rule about axes is broken."""
    found: list[tuple[int, str]] = []
    for axis in MESH_AXES:
        size = getattr(config.parallel, axis)
        others = config.parallel.replica_size // size
        for fitting in nearest_divisors(world_size // others, size) if world_size % others == 0 else ():
            changed = config.with_keys({f"parallel.{axis}": fitting})
            if size > 1 and not any(True for rule in PARALLEL_RULES for _ in rule(changed)):
                found.append((abs(fitting - size), f"parallel.{axis}={fitting}"))
    return min(found)[1] if found else None


def micro_batches_fill_batch(config: RunConfig, world_size: int) -> Found:
    """Every data-parallel rank gets the same number of micro-batches, and interleaved stages whole rounds of them."""
    if world_size % config.parallel.replica_size:
        return
    data_parallel = world_size // config.parallel.replica_size
    yield from _unfilled(config, data_parallel, "train.global_batch_size", config.train.global_batch_size)
    for number, change in enumerate(config.train.batch_ramp):
        key = f"train.batch_ramp.{number}.global_batch_size"
        yield from _unfilled(config, data_parallel, key, change.global_batch_size)


def _unfilled(config: RunConfig, data_parallel: int, key: str, batch: int) -> Found:
    """The fault of one size of the batch."""
    parallel, micro = config.parallel, config.train.micro_batch_size
    unit = micro * data_parallel
    uses = ("train.micro_batch_size", "launch.num_workers", *AXIS_KEYS)
    if batch % unit:
        message = (
            f"must be a multiple of train.micro_batch_size x data parallel size = {micro} x {data_parallel} = {unit}. "
            f"Try {either(nearest_multiples(unit * _round(config), batch))}."
        )
        least = data_parallel * _round(config)
        if batch % least == 0:
            fitting = either(nearest_divisors(batch // least, micro))
            message = f"{message[:-1]}, or for train.micro_batch_size {fitting}."
        elif micro > 1:
            message = f"{message[:-1]}, or {either(nearest_multiples(least, batch))} with train.micro_batch_size=1."
        yield Problem(key, message, batch, uses=uses)
    elif batch // unit % _round(config):
        per_rank = batch // unit
        message = (
            f"gives each rank {per_rank} micro-batch{'' if per_rank == 1 else 'es'}, and interleaved stages "
            f"(parallel.virtual_pipeline = {parallel.virtual_pipeline}) need a multiple of parallel.pipeline = "
            f"{parallel.pipeline}. Try {either(nearest_multiples(unit * parallel.pipeline, batch))}, or "
            "parallel.virtual_pipeline=1."
        )
        yield Problem(key, message, batch, uses=(*uses, "parallel.virtual_pipeline"))


def _round(config: RunConfig) -> int:
    """Micro-batches that a rank takes at once."""
    return config.parallel.pipeline if config.parallel.virtual_pipeline > 1 else 1


PARALLEL_RULES = (
    tensor_divides_layers,
    context_divides_heads,
    exchange_needs_context,
    ring_joins_softmaxes,
    sequence_needs_tensor,
    axes_divide_sequences,
    chunks_need_pipeline,
    schedule_has_stages,
    pipeline_has_layers,
    split_names_every_layer,
)
WORLD_RULES = (axes_divide_world, expert_divides_replicas, micro_batches_fill_batch)
