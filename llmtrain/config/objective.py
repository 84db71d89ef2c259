"""Configuration of objectives: what of a sample is hidden, and what is predicted. Pure: imports no torch.

Lengths follow from it by arithmetic alone, so that every rank knows the shapes of every batch.
"""

from typing import Annotated, Literal

from pydantic import Field

from llmtrain.config.section import AsTuple, Count, CountOrZero, Length, Section, TokenId

Share = Annotated[float, Field(gt=0, lt=1)]
Chance = Annotated[float, Field(ge=0, le=1)]
MeanLength = Annotated[float, Field(gt=0, le=2.0**30)]

ObjectiveName = Literal["causal", "masked", "span_corruption", "ul2", "prefix", "fim"]


class MaskedConfig(Section):
    """Masked language modelling (Devlin et al. 2019, section 3.1)."""

    probability: Share = Field(default=0.15, description="Share of the tokens that are to be predicted.")
    unit: Literal["token", "word", "span"] = Field(
        default="token",
        description="What is chosen together: single tokens, whole words, or spans of words with geometric lengths "
        "(Joshi et al. 2020).",
    )
    span_probability: Share = Field(default=0.2, description="span: parameter of the geometric lengths.")
    max_span: Length = Field(default=10, description="span: longest span, in words.")
    mask_share: Chance = Field(default=0.8, description="Share of the chosen that are replaced by the mask token.")
    random_share: Chance = Field(default=0.1, description="Share of the chosen that are replaced by a random token.")


class CorruptionConfig(Section):
    """Span corruption (Raffel et al. 2020, section 3.1.4)."""

    density: Share = Field(default=0.15, description="Share of the tokens that are taken out.")
    mean_length: MeanLength = Field(default=3.0, description="Mean length of a span.")


class DenoiserConfig(Section):
    """One of UL2's denoisers (Tay et al. 2022, section 3.1)."""

    kind: Literal["spans", "prefix"] = Field(
        default="spans", description="spans: span corruption. prefix: the rest of the sample is taken out (S)."
    )
    density: Share = Field(default=0.15, description="Share of the tokens that are taken out.")
    mean_length: MeanLength = Field(default=3.0, description="spans: mean length of a span.")
    weight: Count = Field(default=1, description="Share of the samples, as a whole number.")
    mode_token: CountOrZero | None = Field(
        default=None, description="Sentinel number that begins the input and tells the denoiser; absent: none does."
    )


class Ul2Config(Section):
    """A mixture of denoisers."""

    denoisers: Annotated[tuple[DenoiserConfig, ...], AsTuple, Field(min_length=1, max_length=1_000)] = Field(
        default=(
            DenoiserConfig(mode_token=97),
            DenoiserConfig(mean_length=8.0, mode_token=97),
            DenoiserConfig(density=0.5, mean_length=3.0, mode_token=98),
            DenoiserConfig(density=0.5, mean_length=8.0, mode_token=98),
            DenoiserConfig(density=0.15, mean_length=64.0, mode_token=98),
            DenoiserConfig(density=0.5, mean_length=64.0, mode_token=98),
            DenoiserConfig(kind="prefix", density=0.25, mode_token=99),
        ),
        description="The denoisers; each sample has one of them.",
    )


class PrefixConfig(Section):
    """Prefix language modelling: the prefix is seen from both sides, the rest is predicted (Raffel et al. 2020)."""

    min_share: Share = Field(default=0.25, description="Least share of a sample that is its prefix.")
    max_share: Share = Field(default=0.75, description="Largest share of a sample that is its prefix.")


class FimConfig(Section):
    """Fill in the middle (Bavarian et al. 2022): documents cut in three, the middle moved to the end."""

    rate: Chance = Field(default=0.5, description="Share of the documents that are cut.")
    suffix_first_share: Chance = Field(
        default=0.5, description="Share of those whose suffix comes before the prefix (SPM)."
    )


class SpecialTokensConfig(Section):
    """Ids of tokens that objectives put into samples. A run folder's config.yaml says those that the run needs."""

    mask: TokenId | None = Field(default=None, description="The mask; absent: the tokenizer's.")
    pad: TokenId | None = Field(
        default=None,
        description="Fills samples up, and begins what the decoder of an encoder_decoder reads, as in T5; absent: the "
        "tokenizer's.",
    )
    sentinels: Annotated[Annotated[tuple[TokenId, ...], Field(max_length=10_000)] | None, AsTuple] = Field(
        default=None,
        description="Sentinels in their order, for objectives that need them. fim: prefix, middle and suffix. Absent: "
        "the tokenizer's (<extra_id_0>, ..., or <fim_prefix>, ...), else ids above it: three for fim, 100 or as many "
        "as are needed for others.",
    )


def needed_tokens(family: str, objective: ObjectiveName) -> tuple[str, ...]:
    """The keys of data.special_tokens that an objective cannot do without."""
    match objective:
        case "masked":
            return ("mask",)
        case "span_corruption" | "ul2":
            return ("pad", "sentinels")
        case "prefix":
            return ("pad",) if family == "encoder_decoder" else ()
        case "fim":
            return ("sentinels",)
        case "causal":
            return ()
