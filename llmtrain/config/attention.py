"""Configuration of attention and of positions. Pure: imports no torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isqrt
from typing import Annotated, Literal

from pydantic import Field

from llmtrain.config.section import Length, LengthOrZero, Positive, Section
from llmtrain.errors import ConfigError

AttentionKind = Literal["full", "sliding_window", "strided", "bigbird", "longformer", "linear"]
ScalingKind = Literal["linear", "ntk", "yarn", "llama3"]


class AttentionConfig(Section):
    """Which positions attend to which, and how scores become weights. Cross-attention is always full."""

    kind: AttentionKind = Field(
        default="full",
        description="full: every visible position. sliding_window: the last `window` (Mistral). strided: the last "
        "`stride`, and every stride-th before (Child et al. 2019). bigbird: blocks near, global and random (Zaheer et "
        "al. 2020). longformer: a window and the first `num_global` positions (Beltagy et al. 2020). linear: no "
        "softmax (Katharopoulos et al. 2020).",
    )
    window: Length | None = Field(
        default=None,
        description="sliding_window, longformer: positions that a query sees, its own included; to either side where "
        "attention is not causal.",
    )
    stride: Length | None = Field(default=None, description="strided: length of a stride.")
    block_size: Length = Field(default=64, description="bigbird: positions per block.")
    num_global: LengthOrZero = Field(
        default=1, description="First blocks (bigbird) or positions (longformer) that see and are seen by all."
    )
    num_random: LengthOrZero = Field(default=2, description="bigbird: random blocks that each block sees.")
    softcap: Positive | None = Field(
        default=None, description="Scores become softcap * tanh(score / softcap) (Gemma 2); absent: they stay."
    )
    sinks: bool = Field(
        default=False, description="A learned score per head that takes part in the softmax and adds nothing."
    )
    scale: Positive | None = Field(
        default=None, description="Factor of the scores; absent: 1 / sqrt(head_dim). T5 has 1."
    )


class RopeScaling(Section):
    """Stretching of rotary positions beyond the length that they were trained at."""

    kind: ScalingKind = Field(
        default="llama3",
        description="linear: all frequencies are divided by the factor (Chen et al. 2023). ntk: the base grows "
        "instead. yarn: a band of frequencies is blended (Peng et al. 2023). llama3: frequencies below a band are "
        "divided.",
    )
    factor: Annotated[float, Field(ge=1, le=2.0**30)] = Field(
        default=8.0, description="How many times longer the context becomes."
    )
    low_freq_factor: Positive = Field(
        default=1.0,
        description="llama3: frequencies with fewer turns in the original length are divided by the whole factor.",
    )
    high_freq_factor: Positive = Field(
        default=4.0,
        description="llama3: frequencies with more turns in the original length stay; between the two it blends.",
    )
    beta_fast: Positive = Field(default=32.0, description="yarn: frequencies with more turns than this stay.")
    beta_slow: Positive = Field(default=1.0, description="yarn: frequencies with fewer turns are divided.")
    attention_factor: Positive | None = Field(
        default=None, description="yarn: what cosine and sine are multiplied by; absent: 0.1 ln(factor) + 1."
    )
    original_max_seq_len: Length = Field(default=8192, description="Length of the sequences before the stretching.")


@dataclass(frozen=True)
class Kind:
    """The keys that one kind reads of its section."""

    reads: tuple[str, ...] = ()
    """Keys that have an effect with this kind, beside those that have one with every kind."""
    required: Mapping[str, Callable[[int], int]] = field(default_factory=dict)
    """Keys of `reads` that must be given, each with a value to try for samples of a length."""
    small: Mapping[str, int] = field(default_factory=dict)
    """Sizes for `llmtrain parity`: so small that the pattern leaves something out of its short samples."""
    no_ring: str = ""
    """Why keys and values cannot go round the context ranks in blocks; empty: they can."""
    widens: bool = False
    """In causal attention, late positions see more keys than early ones, so that they are more work."""


def quarter(seq_len: int) -> int:
    return max(1, seq_len // 4)


ATTENTION_KINDS: dict[str, Kind] = {
    "full": Kind(widens=True),
    "sliding_window": Kind(("window",), {"window": quarter}, {"window": 8}),
    "strided": Kind(("stride",), {"stride": isqrt}, {"stride": 4}, widens=True),
    "bigbird": Kind(("block_size", "num_global", "num_random"), small={"block_size": 4}),
    "longformer": Kind(("window", "num_global"), {"window": quarter}, {"window": 8}),
    "linear": Kind(no_ring="has no softmax, whose parts could be joined"),
}
"""A row per `AttentionKind`. Rules, parity, exports and patterns read it."""

SCALING_KINDS: dict[str, Kind] = {
    "linear": Kind(),
    "ntk": Kind(),
    "llama3": Kind(("low_freq_factor", "high_freq_factor", "original_max_seq_len")),
    "yarn": Kind(("beta_fast", "beta_slow", "attention_factor", "original_max_seq_len")),
}
"""A row per `ScalingKind`."""

KindSection = AttentionConfig | RopeScaling


def kinds_of(section: KindSection) -> tuple[str, dict[str, Kind]]:
    """The dotted key of a section, and the table of its kinds."""
    if isinstance(section, AttentionConfig):
        return "model.attention", ATTENTION_KINDS
    return "model.rope_scaling", SCALING_KINDS


def kind_of(section: KindSection) -> Kind:
    """The row of a section's kind."""
    path, kinds = kinds_of(section)
    if section.kind not in kinds:
        known = ", ".join(kinds)
        raise ConfigError(
            f"{path}.kind = {section.kind}: which keys it reads is in no table, only those of {known} are. "
            "Choose one of these, or add its row to llmtrain/config/attention.py."
        )
    return kinds[section.kind]


def effective_keys(section: KindSection) -> list[str]:
    """Keys that have an effect with the section's kind."""
    own = kind_of(section).reads
    of_some = {key for kind in kinds_of(section)[1].values() for key in kind.reads}
    return [key for key in type(section).model_fields if key in own or key not in of_some]


def required_size(attention: AttentionConfig, key: str) -> int:
    """A size that the section's kind cannot do without."""
    size = getattr(attention, key)
    if size is None:
        raise ConfigError(f"model.attention.kind = {attention.kind} needs model.attention.{key}, which is absent.")
    return size
