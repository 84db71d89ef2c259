"""The section `finetune`: what is trained of a model that has its weights already, and what is added to it. Pure."""

import math
from typing import Annotated, Literal

from pydantic import Field

from llmtrain.config.section import AsTuple, Length, Positive, Probability, Section, Text

Method = Literal["full", "lora", "adapter", "prompt"]

Rank = Annotated[int, Field(ge=1, le=65_536)]


class LoraConfig(Section):
    """Low-rank updates of linears: W + scale B A, of which A and B are trained (Hu et al. 2021, section 4.1)."""

    rank: Rank = Field(default=16, description="Rows of A and columns of B.")
    alpha: Positive = Field(default=32.0, description="The update is multiplied by alpha / rank.")
    rslora: bool = Field(
        default=False, description="Multiply by alpha / sqrt(rank) instead, for large ranks (Kalajdzievski 2023)."
    )
    dropout: Probability = Field(default=0.0, description="Dropout on what goes into A, in training.")
    targets: Annotated[tuple[Text, ...], AsTuple, Field(min_length=1, max_length=1_000)] = Field(
        default=("attention", "mlp"),
        description="The linears that get one: attention (self- and cross-attention), mlp (experts too), one of their "
        "parts such as attention.q, mlp.down or experts.up, or patterns of whole names such as "
        "decoder.layers.0.attention.*.",
    )
    train_also: Annotated[tuple[Text, ...], AsTuple, Field(max_length=1_000)] = Field(
        default=(),
        description="Patterns of the model's own parameters that are trained beside them, such as *norm* or "
        "embeddings.word.weight.",
    )

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class AdapterConfig(Section):
    """Bottlenecks in the layers: up(f(down(x))), added to the residual stream (Houlsby et al. 2019, section 2.1)."""

    size: Length = Field(default=64, description="Width of the bottleneck.")
    placement: Literal["output", "both"] = Field(
        default="output",
        description="output: one in each layer, behind its MLP or experts, which reads the sum of both (Pfeiffer et "
        "al. 2021). both: one behind self-attention and one behind the MLP, which read what these put out (Houlsby et "
        "al. 2019).",
    )
    activation: Literal["gelu", "relu", "silu"] = Field(default="gelu", description="The function between the two.")


class PromptConfig(Section):
    """A soft prompt: embeddings of positions before the text, which are trained (Lester et al. 2021)."""

    tokens: Annotated[int, Field(ge=1, le=65_536)] = Field(
        default=20, description="Positions that the prompt takes before each sample, beside data.seq_len."
    )
    init: Literal["vocabulary", "text"] = Field(
        default="vocabulary",
        description="They begin as the embeddings of pieces that are drawn from the vocabulary, or of those of text.",
    )
    text: Text | None = Field(
        default=None, description="init=text: the text; it is repeated until it is long enough, and cut."
    )


class FinetuneConfig(Section):
    """Training that begins with weights that are there already."""

    base: Text | None = Field(
        default=None,
        description="Where the run begins: an import, a run (its newest checkpoint) or a checkpoint. Its weights are "
        "taken; steps, schedule, moments and data begin anew. Absent: checkpoint.resume says it.",
    )
    method: Method = Field(
        default="full",
        description="full: all parameters, but those that optim.freeze names. lora, adapter, prompt: what the section "
        "of this name adds is trained, and the model itself is frozen.",
    )
    lora: LoraConfig = Field(default_factory=LoraConfig)
    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    prompt: PromptConfig = Field(default_factory=PromptConfig)
