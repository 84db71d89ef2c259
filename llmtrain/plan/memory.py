"""The memory that a run takes on each rank, by arithmetic, and the settings that need less where it has run out.

What a rank holds all the time and what a step adds are estimates: layers are taken as split evenly, and Python, PyTorch
and communication need some beside them. Each setting that is advised is legal for the very configuration. No torch.
"""

import errno
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from math import lcm
from typing import Any

from llmtrain.config.engines import ENGINES, engines_that
from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import declare_parameters, expert_ffn_size, num_elements, quantized_linears
from llmtrain.config.rules.arithmetic import arithmetic_problems
from llmtrain.config.schema import RunConfig
from llmtrain.config.sequence_lengths import Lengths
from llmtrain.optim.table import row_of
from llmtrain.parallel.layout import Layout, plan_layout
from llmtrain.plan.deferred import deferred_elements

LOGITS_BYTES = 8
"""Of each logit in a chunk of the output layer: its value and its gradient in fp32."""

TAUGHT_BYTES = 4
"""More of each where there is a teacher: the student's predictions at its temperature, in fp32."""

PREDICTED_BYTES = 8
"""Of each likeliest token that a teacher predicts: its probability and its id."""

LARGEST_AXIS = 64
"""No axis is suggested beyond this size."""

SMALLEST_CHUNK_TOKENS = 128
WORTHWHILE_BYTES = 32 << 20
"""Chunks of the output layer that are smaller are not what fills the memory."""

HALVES = "halves activations, and costs no speed; 2 bytes more per weight, and numbers are rounded more"
OTHER_SAMPLES = "other samples: a new run, not a continued one"

_EXHAUSTED = re.compile(r"out of memory|not enough memory|can(?:'t|not) allocate memory|_ALLOC_FAILED", re.IGNORECASE)

Settings = Mapping[str, Any]
"""Values by dotted key."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one rank. `held` are weights, gradients, masters and moments; `activations` what a step keeps between
    forward and backward; `logits` a chunk of the output layer; `teacher` its weights, and its predictions of a step."""

    held: int
    activations: int
    logits: int
    teacher: int = 0


def head_rows(config: RunConfig) -> int:
    """Rows of a rank's output layer; one for labels is whole on every tensor rank."""
    return config.model.head_rows // (1 if config.model.predicts_labels else config.parallel.tensor)


def chunk_tokens(config: RunConfig, on_gpu: bool) -> int:
    """Tokens of a chunk of the output layer."""
    return config.train.chunk_tokens(head_rows(config), on_gpu)


def plan_memory(config: RunConfig, layout: Layout, lengths: Lengths) -> MemoryPlan:
    """The estimate for a rank of the first pipeline stage, which holds the most. Needs model.vocab_size."""
    on_gpu = config.launch.device != "cpu"  # a plan may be for another machine than this
    chunk = chunk_tokens(config, on_gpu)
    tokens = min(chunk, config.train.micro_batch_size * lengths.main // layout.context)
    return MemoryPlan(
        round(held_bytes(config, layout)),
        round(activation_bytes(config, layout, lengths, Kernels.of(on_gpu))),
        tokens * head_rows(config) * (LOGITS_BYTES + (TAUGHT_BYTES if config.distill else 0)),
        round(teacher_bytes(config, layout, lengths)),
    )


def teacher_bytes(config: RunConfig, layout: Layout, lengths: Lengths) -> float:
    """The teacher's weights, which ZeRO does not shard, and of each token of a step what it predicts; of an average
    stage. Its activations are those of one micro-batch without a backward pass: fewer than the student's."""
    if config.distill is None or config.distill.model is None:
        return 0.0
    teacher, num_bytes = config.distill.model, 4 if config.train.precision == "fp32" else 2
    weights = sum(
        num_elements(parameter, teacher) / (layout.expert if parameter.expert else 1)
        for parameter in declare_parameters(teacher).values()
    )
    tokens = max(config.train.batch_sizes.sizes) // layout.data * lengths.main // layout.context
    predicted = tokens * (config.distill.top_k * PREDICTED_BYTES + 4)
    return weights * num_bytes / (layout.tensor * layout.pipeline) + predicted


def held_bytes(config: RunConfig, layout: Layout) -> float:
    """Weights, their gradients, fp32 masters and the optimizer's moments of one rank."""
    shards = layout.data * layout.context
    stage = config.engine.zero_stage
    low = config.train.precision != "fp32"
    weights, gradients = (2, 4) if low else (4, 4)
    row = row_of(config.optim)
    optimizer = row.stored_bytes if low else row.state_bytes  # in fp32 the weights are their own masters
    optimizer = 0 if config.engine.offload != "none" else optimizer / (shards if stage >= 1 else 1)
    weights /= shards if stage >= 3 else 1
    trained = gradients / (shards if stage >= 2 else 1) + optimizer
    packed = packed_share(config)
    held = 0.0
    for name, parameter in declare_parameters(config.model, config.finetune).items():
        size = num_elements(parameter, config.model) / (layout.expert if parameter.expert else 1)
        held += size * (weights * packed.get(name, 1.0) if name in config.frozen else weights + trained)
    return held / (layout.tensor * layout.pipeline)


def packed_share(config: RunConfig) -> dict[str, float]:
    """Of weights that lie packed where they are frozen: their bytes, with scales, by those of floats."""
    if config.quantize is None:
        return {}
    numbers, num_bytes = config.quantize.numbers, 4 if config.train.precision == "fp32" else 2
    return {
        weight.name: numbers.bits / 8 / num_bytes + 1 / (numbers.group or weight.shape[-1])
        for _, weight in quantized_linears(config.model, config.quantize.keep)
    }


@dataclass(frozen=True)
class Kernels:
    """What the kernels of a device keep.

    `per_norm` is how many tensors as wide as the residual a norm and its input take: 2 where one kernel does it.
    `repeats_keys`: keys and values are kept as often as there are queries. `keeps_product`: of an activation its result
    is kept, and what it is made of where it is gated, beside its inputs.
    """

    per_norm: int = 2
    repeats_keys: bool = False
    keeps_product: bool = False

    @staticmethod
    def of(on_gpu: bool) -> "Kernels":
        return Kernels() if on_gpu else Kernels(repeats_keys=True, keeps_product=True)


def activation_bytes(config: RunConfig, layout: Layout, lengths: Lengths, kernels: Kernels) -> float:
    """Bytes that all micro-batches under way keep for the backward pass on a rank of the first pipeline stage; under
    the zero-bubble schedule on a rank of the last one, where that is more."""
    model, train = config.model, config.train
    num_bytes = 4 if train.precision == "fp32" else 2
    encoded = lengths.encoder or lengths.main  # of an encoder alone, the sample
    kept = encoded * model.encoder_layers * _layer_elements(config, layout, False, kernels)
    kept += lengths.main * model.decoder_layers * _layer_elements(config, layout, True, kernels)
    if train.recompute == "full":  # one layer at a time is there in whole
        plain = config.with_keys({"train.recompute": "none"})
        # While it is there, it keeps the product too: see models/pointwise.py.
        whole = _layer_elements(plain, layout, True, replace(kernels, keeps_product=True))
        kept += max(lengths.main, lengths.encoder) * whole * layout.pipeline
    micro_batches = max(train.batch_sizes.sizes) // (train.micro_batch_size * layout.data)
    under_way = min(layout.pipeline, micro_batches)
    if layout.pipeline_schedule == "zero_bubble":
        # Of so many micro-batches the first stage keeps all, and the last one what their weight gradients are made of.
        kept = max(kept, deferred_elements(config, layout, lengths))
    return kept / layout.pipeline * under_way * train.micro_batch_size * num_bytes / layout.context


def _layer_elements(config: RunConfig, layout: Layout, is_decoder: bool, kernels: Kernels) -> float:
    """Numbers that a layer keeps of each token: inputs of norms and of matrix products, queries, keys and values."""
    model, selective = config.model, config.train.recompute == "selective"
    hidden = model.hidden_size / (layout.tensor if layout.sequence else 1)
    if config.train.recompute == "full":
        return hidden
    keys = _kept_key_heads(config, layout, repeated=kernels.repeats_keys and not selective)
    attention = kernels.per_norm * hidden + 2 * (model.num_heads + keys) * model.head_size / layout.tensor
    crosses = model.family == "encoder_decoder" and is_decoder
    mlp = _mlp_elements(model, selective, kernels.keeps_product) / layout.tensor
    return attention * (2 if crosses else 1) + kernels.per_norm * hidden + mlp


def _kept_key_heads(config: RunConfig, layout: Layout, repeated: bool) -> int:
    """Of all tensor ranks; `repeated`: kernels keep as many as there are queries."""
    model, own = config.model, config.model.kv_heads // layout.tensor
    if config.context_exchange == "ring":
        return model.kv_heads  # blocks are kept as they were sent
    return model.num_heads if repeated else lcm(own, layout.context) * layout.tensor  # at least one for each rank


def _mlp_elements(model: ModelConfig, selective: bool, keeps_product: bool) -> float:
    """Of an average layer: the inputs of the activation, unless they are all that is needed, and of the last matrix."""
    tensors = 4 if model.gated else 1 if model.activation == "relu" else 2
    if selective:
        tensors = 3 if model.gated else 2
    if not keeps_product:
        tensors = 2 if model.gated else 1
    if model.moe is None:
        return tensors * model.ffn_size
    layers = [layer for layer in range(model.decoder_layers or model.encoder_layers) if model.has_experts(layer)]
    share = len(layers) / (model.decoder_layers or model.encoder_layers)
    experts = (tensors * expert_ffn_size(model) + 2 * model.hidden_size) * model.moe.choices
    shared = tensors * expert_ffn_size(model) * model.moe.num_shared_experts
    return (1 - share) * tensors * model.ffn_size + share * (experts + shared)


@dataclass(frozen=True)
class Advice:
    """Settings that need less memory, and what they cost."""

    settings: Settings
    effect: str

    def __str__(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.settings.items())


def is_out_of_memory(error: BaseException) -> bool:
    """True where memory has run out, of a device or of the machine, in whatever way a library says it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError):
            return True
        if isinstance(seen, OSError) and seen.errno == errno.ENOMEM:
            return True
        if isinstance(seen, RuntimeError) and _EXHAUSTED.search(str(seen)):
            return True
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return False


def advise(error: BaseException, config: RunConfig, device_type: str) -> None:
    """Add what would help to an error that says that memory has run out; it then stands below its text."""
    with suppress(MemoryError):  # there may not even be enough for this
        if is_out_of_memory(error):
            error.add_note(advice_text(config, device_type))


def advice_text(config: RunConfig, device_type: str) -> str:
    """The advice as lines for a person."""
    size = held_bytes(config, plan_layout(config.parallel, config.launch.num_workers))
    held = f"{size / 1e9:.1f} GB of each rank" if size >= 1e9 else f"{size / 1e6:.1f} MB of each rank"
    found = memory_advice(config, device_type)
    if not found:
        return f"Memory ran out; weights, gradients and moments alone hold about {held}. No setting needs less."
    width = min(60, max(len(str(advice)) for advice in found))
    return "\n".join(
        [
            f"Memory ran out; weights, gradients and moments alone hold about {held}.",
            "What would help, in the order of what it costs in speed; the run goes on from its newest checkpoint:",
            *(f"  {advice!s:<{width}}  {advice.effect}" for advice in found),
        ]
    )


def memory_advice(config: RunConfig, device_type: str) -> list[Advice]:
    """Settings that would help on `device_type` (cpu or cuda), each legal by itself, the cheapest in speed first."""
    return [
        *_smaller_chunks(config, device_type == "cuda"),
        *(_one(config, HALVES, [{"train.precision": "bf16"}]) if config.train.precision == "fp32" else ()),
        *_zero(config, 1, "shards the moments over the data-parallel ranks, at no cost"),
        *_smaller_micro_batches(config),
        *_recompute(config, "selective", "attention and the MLP's activation are computed twice"),
        *_zero(config, 2, "shards the gradients too, and reduces them more often"),
        *_recompute(config, "full", "every layer is computed twice: about a third slower, activations almost gone"),
        *_zero(config, 3, "shards the weights too, and gathers them for every micro-batch"),
        *_axis(config, "expert", "spreads the experts over ranks, to which tokens travel"),
        *_axis(config, "tensor", "splits every layer; slow between machines"),
        *_axis(config, "context", "splits the sequence"),
        *_axis(config, "pipeline", "splits the layers; ranks wait at both ends of a step"),
        *_offload(config, device_type),
        *_one(config, OTHER_SAMPLES, ({"data.seq_len": size} for size in range(config.data.seq_len // 2, 0, -1))),
    ]


def _first_legal(config: RunConfig, options: Iterable[Settings]) -> Settings | None:
    """The first of the settings that break no rule; in it only what differs from the configuration."""
    for settings in options:
        other = config.with_keys(settings)
        if other != config and not arithmetic_problems(other, other.launch.num_workers):
            return {key: value for key, value in settings.items() if config.with_keys({key: value}) != config}
    return None


def _one(config: RunConfig, effect: str, options: Iterable[Settings]) -> Iterator[Advice]:
    settings = _first_legal(config, options)
    if settings:
        yield Advice(settings, effect)


def _smaller_chunks(config: RunConfig, on_gpu: bool) -> Iterator[Advice]:
    chunk = chunk_tokens(config, on_gpu)
    tokens = min(chunk, config.train.micro_batch_size * config.data.seq_len)
    smaller = max(SMALLEST_CHUNK_TOKENS, tokens // 4)
    saved = (tokens - smaller) * head_rows(config) * 4
    if saved >= WORTHWHILE_BYTES:
        effect = f"{saved / 1e6:,.0f} MB less for the output layer, at almost no cost"
        yield from _one(config, effect, [{"train.loss_chunk_tokens": smaller}])


def _smaller_micro_batches(config: RunConfig) -> Iterator[Advice]:
    now = config.train.micro_batch_size
    sizes = [size for size in range(now - 1, 0, -1) if _first_legal(config, [{"train.micro_batch_size": size}])]
    if sizes:
        further = f", {' or '.join(map(str, sizes[1:4]))} less still" if len(sizes) > 1 else ""
        effect = f"{sizes[0] / now:.0%} of the activations, the same loss{further}"
        yield Advice({"train.micro_batch_size": sizes[0]}, effect)


def _recompute(config: RunConfig, kind: str, effect: str) -> Iterator[Advice]:
    kinds = ("none", "selective", "full")
    if kinds.index(kind) > kinds.index(config.train.recompute):
        yield from _one(config, effect, [{"train.recompute": kind}])


def _zero(config: RunConfig, stage: int, effect: str) -> Iterator[Advice]:
    sharding_ranks = config.launch.num_workers // (config.parallel.tensor * config.parallel.pipeline)
    if stage > config.engine.zero_stage and sharding_ranks > 1:
        yield from _one(config, effect, ({**engine, "engine.zero_stage": stage} for engine in _engines(config)))


def _axis(config: RunConfig, axis: str, effect: str) -> Iterator[Advice]:
    """The next size of an axis: among the ranks that there are, or where that is not possible, with more of them."""
    now = getattr(config.parallel, axis)
    key, workers = f"parallel.{axis}", config.launch.num_workers
    sizes = range(now + 1, LARGEST_AXIS + 1)
    among = ({**engine, key: size} for engine in _engines(config) for size in sizes)
    more = (
        {**engine, key: size, "launch.num_workers": workers * size // now}
        for engine in _engines(config)
        for size in range(2 * now, LARGEST_AXIS + 1, now)
    )
    settings = _first_legal(config, among)
    if settings:
        yield Advice(settings, effect)
    else:
        yield from _one(config, f"{effect}; on more devices", more)


def _offload(config: RunConfig, device_type: str) -> Iterator[Advice]:
    engine = config.engine
    if engine.offload == "none" and device_type == "cuda":
        effect = "masters and moments in the machine's memory; the update is slow"
        # The stage in use where it will do, else the next.
        ways = (way for way in _offloads("cpu") if way["engine.zero_stage"] >= engine.zero_stage)
        yield from _one(config, effect, ways)
    if engine.offload != "nvme":
        effect = "masters and moments on the local disk (any folder there); the slowest update"
        yield from _one(config, effect, ({**way, "engine.nvme_path": "/tmp/llmtrain"} for way in _offloads("nvme")))


def _offloads(kind: str) -> Iterator[Settings]:
    """Engines that move optimizer state to a place, with each ZeRO stage that it goes with."""
    for name, row in ENGINES.items():
        for stage in row.offloads.get(kind, ()):
            yield {"engine.name": name, "engine.zero_stage": stage, "engine.offload": kind}


def _engines(config: RunConfig) -> list[Settings]:
    """The engine in use first, then those that split more than the batch."""
    others = engines_that(lambda row: bool(row.axes))
    return [{"engine.name": name} for name in dict.fromkeys((config.engine.name, *others))]
