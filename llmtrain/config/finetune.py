"""The sections `finetune`, `distill`, `prune` and `quantize`: what is trained of a model that has its weights already,
what is added to it, what it learns from beside the data, which weights it loses, and how they are rounded. Pure."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from llmtrain.config.model import ModelConfig
from llmtrain.config.section import AsTuple, AsWhole, Length, Positive, Probability, Section, Steps, Text

Method = Literal["full", "lora", "adapter", "prompt"]
PruneKind = Literal["magnitude", "2:4", "kept"]
SchemeName = Literal["w8a16", "w8a8", "w4a16"]

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


class DistillConfig(Section):
    """Learning from a teacher: (1 - weight) x the plain loss + weight x temperature^2 x the divergence of the student's
    predictions from the teacher's (Hinton et al. 2015, section 2)."""

    teacher: Text = Field(
        description="An import, a run (its newest checkpoint) or a checkpoint. It reads the same samples as the model, "
        "split as the model is, in its precision, and is not trained."
    )
    temperature: Annotated[float, Field(gt=0, le=1_000)] = Field(
        default=1.0, description="The logits of both are divided by this before they are compared."
    )
    top_k: Annotated[int, Field(ge=1, le=2**20), AsWhole] = Field(
        default=64,
        description="Of each prediction of the teacher so many likeliest tokens are told apart; all others count as "
        "one. As many as the vocabulary has: all of them.",
    )
    weight: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.5, description="Share of the teacher in the loss; the data's targets have the rest."
    )
    model: ModelConfig | None = Field(
        default=None,
        description="The teacher's architecture, with the keys of `model`. null, as usual: taken from its files.",
    )


class PruneConfig(Section):
    """Pruning in training. A weight of a target that is zero has no gradient and no moments, and stays zero."""

    kind: PruneKind = Field(
        default="magnitude",
        description="magnitude: of each matrix the weights that are nearest to zero. 2:4: of every four neighbours "
        "along a matrix's input the two nearest to zero. kept: none; the zeros that a run begins with stay zero.",
    )
    sparsity: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.5, description="magnitude: the share of each matrix that is zero in the end."
    )
    from_step: Steps = Field(default=1, description="The step behind which weights are pruned first.")
    until_step: Steps | None = Field(
        default=None,
        description="magnitude: the step behind which they are pruned last. The share rises up to there, fast at first "
        "(Zhu and Gupta 2017, section 3). null: all at from_step.",
    )
    every_steps: Steps = Field(default=100, description="magnitude: steps between two prunings.")
    targets: Annotated[tuple[Text, ...], AsTuple, Field(min_length=1, max_length=1_000)] = Field(
        default=("attention", "mlp"),
        description="The linears that are pruned: attention, mlp (experts too), one of their parts such as attention.q "
        "or mlp.down, or patterns of whole names such as decoder.layers.0.*.",
    )

    def prunes_behind(self, step: int) -> bool:
        """True for a step behind which weights are pruned."""
        if self.kind == "kept":
            return False
        last = self.until_step or self.from_step
        return step == last or (self.from_step <= step < last and (step - self.from_step) % self.every_steps == 0)

    def keeps_zeros(self, step: int) -> bool:
        """True for a step whose weights have been pruned before it."""
        return self.kind == "kept" or step > self.from_step

    def sparsity_behind(self, step: int) -> float:
        """The share of each target that has been pruned up to a step: s (1 - (1 - t)^3), t the share of the time at the
        last pruning."""
        first, last = self.from_step, self.until_step or self.from_step
        if step < first:
            return 0.0
        if step >= last:
            return 0.5 if self.kind == "2:4" else self.sparsity
        pruned = step - (step - first) % self.every_steps
        return self.sparsity * (1 - (1 - (pruned - first) / (last - first)) ** 3)


@dataclass(frozen=True)
class NumberScheme:
    """Bits of a weight; how many inputs share a scale where it is not said, None: all of an output; and whether what
    goes into a matrix is rounded to 8 bits as well."""

    bits: int
    group: int | None = None
    rounds_inputs: bool = False


NUMBER_SCHEMES: dict[SchemeName, NumberScheme] = {
    "w8a16": NumberScheme(bits=8),
    "w8a8": NumberScheme(bits=8, rounds_inputs=True),
    "w4a16": NumberScheme(bits=4, group=128),
}


class QuantizeConfig(Section):
    """Training with whole numbers: the products of the layers' linears are those of the rounded weights, forward and
    backward. Weights that are trained get the gradient of what they are rounded to (Jacob et al. 2017, section 3);
    those that are not lie packed in memory (Dettmers et al. 2023)."""

    scheme: SchemeName = Field(
        default="w8a16",
        description="As for `llmtrain compress`: weights of 8 or 4 bits; w8a8: what goes into them is rounded to 8 "
        "bits as well, each position by itself.",
    )
    group: Annotated[int, Field(ge=0, le=1 << 24), AsWhole] | None = Field(
        default=None, description="Inputs of a matrix that share a scale; 0: all. null: 128 for w4a16, else 0."
    )
    keep: Annotated[tuple[Text, ...], AsTuple, Field(max_length=1_000)] = Field(
        default=(),
        description="The linears that are not rounded: attention, mlp (experts too), one of their parts such as "
        "mlp.down, or patterns of whole names such as decoder.layers.0.*.",
    )

    @property
    def numbers(self) -> NumberScheme:
        """The scheme, with the group that is asked for."""
        usual = NUMBER_SCHEMES[self.scheme]
        group = usual.group if self.group is None else self.group or None
        return NumberScheme(usual.bits, group, usual.rounds_inputs)
