"""What would help where memory has run out: settings that are legal for this very configuration."""

import errno
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from llmtrain.config.engines import ENGINES, engines_that
from llmtrain.config.rules.arithmetic import arithmetic_problems
from llmtrain.config.schema import RunConfig
from llmtrain.parallel.layout import plan_layout
from llmtrain.plan.memory import held_bytes

LARGEST_AXIS = 64
"""No axis is suggested beyond this size."""

SMALLEST_CHUNK_TOKENS = 128
WORTHWHILE_BYTES = 32 << 20
"""Chunks of the output layer that are smaller are not what fills the memory."""

_EXHAUSTED = re.compile(r"out of memory|not enough memory|can(?:'t|not) allocate memory|_ALLOC_FAILED", re.IGNORECASE)

Settings = Mapping[str, Any]
"""Values by dotted key."""


@dataclass(frozen=True)
class Advice:
    """Settings that need less memory, and what they cost."""

    settings: Settings
    effect: str

    def __str__(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.settings.items())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory has run out, of a device or of the machine, in whatever way a library says it."""
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
    """What would help, for a person."""
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
        *_smaller_chunks(config),
        *_low_precision(config),
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
        *_shorter_samples(config),
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


def _smaller_chunks(config: RunConfig) -> Iterator[Advice]:
    tokens = min(config.train.loss_chunk_tokens, config.train.micro_batch_size * config.data.seq_len)
    smaller = max(SMALLEST_CHUNK_TOKENS, tokens // 4)
    saved = (tokens - smaller) * config.model.padded_vocab_size // config.parallel.tensor * 4
    if saved >= WORTHWHILE_BYTES:
        effect = f"{saved / 1e6:,.0f} MB less for the output layer, at almost no cost"
        yield from _one(config, effect, [{"train.loss_chunk_tokens": smaller}])


def _low_precision(config: RunConfig) -> Iterator[Advice]:
    if config.train.precision == "fp32":
        effect = "halves activations, and costs no speed; 2 bytes more per weight, and numbers are rounded more"
        yield from _one(config, effect, [{"train.precision": "bf16"}])


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
    more = ({**option, "launch.num_workers": workers * option[key] // now} for option in _multiples(config, key, now))
    settings = _first_legal(config, among)
    if settings:
        yield Advice(settings, effect)
    else:
        yield from _one(config, f"{effect}; on more devices", more)


def _multiples(config: RunConfig, key: str, now: int) -> Iterator[Settings]:
    for engine in _engines(config):
        for size in range(2 * now, LARGEST_AXIS + 1, now):
            yield {**engine, key: size}


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


def _shorter_samples(config: RunConfig) -> Iterator[Advice]:
    half = config.data.seq_len // 2
    options = ({"data.seq_len": length} for length in range(half, 0, -1))
    yield from _one(config, "other samples: a new run, not a continued one", options)


def _engines(config: RunConfig) -> list[Settings]:
    """The engine in use first, then those that split more than the batch."""
    others = engines_that(lambda row: bool(row.axes))
    return [{"engine.name": name} for name in dict.fromkeys((config.engine.name, *others))]
