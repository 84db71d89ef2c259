"""Configuration of attention and of positions. Pure: imports no torch."""

from typing import Annotated, Literal

from pydantic import Field

from llmtrain.config.section import Length, LengthOrZero, Positive, Section

AttentionKind = Literal["full", "sliding_window", "strided", "bigbird", "longformer", "linear"]


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

    kind: Literal["linear", "ntk", "yarn", "llama3"] = Field(
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
