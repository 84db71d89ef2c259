"""The section `data`: sources, and what an objective hides of a sample and predicts. Pure: imports no torch.

The lengths of sequences follow from it by arithmetic alone, so that every rank knows the shapes of every batch.
"""

from typing import Annotated, Literal

from pydantic import Field

from llmtrain.config.section import (
    AsTuple,
    AsWhole,
    Count,
    CountOrZero,
    Length,
    Probability,
    Samples,
    Seconds,
    Section,
    Steps,
    Text,
    TokenId,
    Weight,
    WeightOrZero,
)

Share = Annotated[float, Field(gt=0, lt=1)]
Chance = Annotated[float, Field(ge=0, le=1)]
MeanLength = Annotated[float, Field(gt=0, le=2.0**30)]

ObjectiveName = Literal["causal", "masked", "span_corruption", "ul2", "prefix", "fim", "chat", "labels"]
WindowKind = Literal["continuous", "per_shard"]

Packing = Literal["none", "best_fit", "single"]
TooLong = Literal["cut", "error", "drop", "truncate"]
"""What becomes of a document that is longer than a sample: only running text is cut into several."""

USUAL_PACKING: dict[str, Packing] = {"chat": "best_fit", "labels": "single"}
"""data.packing by objective where it is absent; none for all others."""

LONGEST_PERIOD = 1_000_000
"""Largest sum of mixture weights: the schedule of one period is held in memory."""


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


class ChatConfig(Section):
    """Conversations of which some tokens are targets, as their shards say."""

    train_on: Literal["assistant", "last", "all"] = Field(
        default="assistant",
        description="What is predicted: all that the assistant says, its last turn of a conversation, or everything.",
    )
    train_on_end: bool = Field(
        default=True,
        description="The token that ends a turn is a target too. A model that never learns it does not stop.",
    )
    too_long: Literal["error", "drop", "truncate"] = Field(
        default="error",
        description="Conversations of more than data.seq_len tokens: the run is refused, they are left out, or lose "
        "their end.",
    )


class AugmentConfig(Section):
    """Noise in what the model reads while it is trained, never in what it is to predict."""

    drop_tokens: Probability = Field(default=0.0, description="Probability that a token is dropped.")
    delete_words: Probability = Field(
        default=0.0, description="Probability that a word is dropped with all its tokens (Wei and Zou 2019)."
    )
    replace_words: Probability = Field(
        default=0.0, description="Probability that random tokens stand in place of a word's (Xie et al. 2017)."
    )
    swap_words: Probability = Field(
        default=0.0, description="Probability that a word changes places with the next (Wei and Zou 2019)."
    )

    @property
    def is_on(self) -> bool:
        return self.shortens or self.replace_words > 0 or self.swap_words > 0

    @property
    def shortens(self) -> bool:
        """True where rows end in padding for what was dropped."""
        return self.drop_tokens > 0 or self.delete_words > 0


class LabelsConfig(Section):
    """Texts with labels: those of shards that `llmtrain data labels` writes."""

    too_long: Literal["error", "drop"] = Field(
        default="error",
        description="Texts of more than data.seq_len tokens: the run is refused, or they are left out. To shorten "
        "them, write them with --max-tokens.",
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
        case "causal" | "chat" | "labels":
            return ()


class DataSetConfig(Section):
    """One data set and its share of a mixture."""

    path: Text = Field(
        description="Folder with shards and their manifest.json, or the URL of one: https, http, s3, gs or hf."
    )
    weight: Weight = Field(default=1, description="Samples of this source per period of the mixture.")


class SourceConfig(DataSetConfig):
    """A data set to train on: its share, and how much of it a run may use.

    Where a source has given all that it may, the others go on without it, in the shares that they have.
    """

    weight: WeightOrZero = Field(
        default=1,
        description="Samples of this source per period of the mixture; 0: none until data.schedule gives it some.",
    )
    max_epochs: Count | None = Field(default=None, description="How often the run goes through this source at most.")
    max_samples: Samples | None = Field(default=None, description="Samples that the run takes of this source at most.")
    max_tokens: Samples | None = Field(
        default=None,
        description="Tokens that the run takes of this source at most, data.seq_len for each sample, rounded down to "
        "whole samples.",
    )


class PhaseConfig(Section):
    """Weights that a mixture has from a step on."""

    from_step: Steps | None = Field(
        default=None,
        description="The first step with these weights; steps count from 1. The run folder's config.yaml says the "
        "sample that it begins with.",
    )
    from_sample: Samples | None = Field(
        default=None, description="The first sample with these weights, instead of from_step; samples count from 0."
    )
    weights: Annotated[tuple[WeightOrZero, ...], AsTuple, Field(min_length=1, max_length=10_000)] = Field(
        description="A weight for each source of data.train, in their order; 0: none of it."
    )

    @property
    def first_sample(self) -> int:
        """The phase's first sample, which is known once the run is resolved."""
        assert self.from_sample is not None, "from_step is replaced before the run"
        return self.from_sample


class DataConfig(Section):
    """Where samples come from and what they look like."""

    train: Annotated[tuple[SourceConfig, ...], AsTuple, Field(min_length=1, max_length=10_000)] = Field(
        description="Training sources."
    )
    schedule: Annotated[tuple[PhaseConfig, ...], AsTuple, Field(max_length=1_000)] = Field(
        default=(),
        description="Steps from which on the training sources have other weights, such as "
        "[{from_step: 1001, weights: [1, 3]}].",
    )
    valid: Annotated[tuple[DataSetConfig, ...], AsTuple, Field(max_length=10_000)] = Field(
        default=(), description="Evaluation sources."
    )
    tokenizer: Text | None = Field(
        default=None,
        description="sentencepiece .model or tokenizer.json; absent: the one kept beside the first training source.",
    )
    seq_len: Length = Field(default=1024, description="Tokens per sample.")
    objective: ObjectiveName = Field(
        default="causal",
        description="causal: predict each next token. masked: predict hidden tokens (encoder). span_corruption: "
        "predict spans that were taken out, ul2: a mixture of that (encoder_decoder). prefix: predict what follows a "
        "prefix (decoder, encoder_decoder). fim: causal, with middles of documents moved to the end (decoder). chat: "
        "what an assistant says in conversations (decoder). labels: what `llmtrain data labels` has written of texts "
        "(encoder, decoder), with a model.head for it.",
    )
    masked: MaskedConfig = Field(default_factory=MaskedConfig)
    span_corruption: CorruptionConfig = Field(default_factory=CorruptionConfig)
    ul2: Ul2Config = Field(default_factory=Ul2Config)
    prefix: PrefixConfig = Field(default_factory=PrefixConfig)
    fim: FimConfig = Field(default_factory=FimConfig)
    chat: ChatConfig = Field(default_factory=ChatConfig)
    augment: AugmentConfig = Field(default_factory=AugmentConfig)
    labels: LabelsConfig = Field(default_factory=LabelsConfig)
    special_tokens: SpecialTokensConfig = Field(default_factory=SpecialTokensConfig)
    reset_positions: bool = Field(
        default=False,
        description="Positions start again at each document in a sample; with objective=chat they always do.",
    )
    reset_attention: bool = Field(
        default=False,
        description="Positions attend only within their document; the first token of a document is no target. With "
        "objective=chat it always is so.",
    )
    windows: WindowKind | None = Field(
        default=None,
        description="Samples cross the ends of shards, so that every token is used (continuous), or each lies in one "
        "shard, whose last tokens no sample holds (per_shard). Absent: continuous, but a run that continues an older "
        "checkpoint goes on as that one.",
    )
    packing: Packing | None = Field(
        default=None,
        description="none: samples are windows of the documents' stream, which cut documents where they end. "
        "best_fit: samples are put together of whole documents and filled up with padding; only documents longer than "
        "a sample are cut. single: each document is a sample, filled up with padding. Absent: best_fit for "
        "objective=chat, which cuts none, single for labels, else none.",
    )
    shuffle_shards: Count = Field(default=8, description="Samples are shuffled within groups of this many shards.")
    verify: Literal["off", "first", "always"] = Field(
        default="first", description="Hash a shard never, before its first use in a run, or at every opening."
    )
    on_corrupt: Literal["fail", "skip"] = Field(
        default="fail",
        description="A damaged or missing shard ends the run, or its samples have no targets and it is listed in "
        "skipped_shards.jsonl, for good.",
    )
    max_skipped: Probability = Field(
        default=0.001, description="Share of a source's samples that on_corrupt=skip may lose before the run ends."
    )
    cache_dir: Text | None = Field(
        default=None,
        description="Folder for shards of remote sources; absent: llmtrain among the user's caches, on Linux in "
        "XDG_CACHE_HOME or ~/.cache.",
    )
    cache_limit_gb: Annotated[float, Field(gt=0, le=1e9)] | None = Field(
        default=None,
        description="Gigabytes of fetched shards and sidecars that the cache may hold: those least recently used that "
        "no process reads make room for others. Absent: all are kept.",
    )
    fetch_attempts: Count = Field(default=5, description="Tries to fetch a remote file, with growing pauses.")
    fetch_timeout_seconds: Seconds = Field(default=60.0, description="Longest silence of a remote server.")
    prefetch_steps: Annotated[int, Field(ge=0, le=1_000), AsWhole] = Field(
        default=2, description="Steps whose batches are prepared ahead."
    )

    @property
    def packing_kind(self) -> Packing:
        """data.packing, or what its absence means."""
        return self.packing or USUAL_PACKING.get(self.objective, "none")

    @property
    def too_long(self) -> TooLong:
        """What becomes of documents that are longer than a sample, where those are put together of whole ones."""
        match self.objective:
            case "chat":
                return self.chat.too_long
            case "labels":
                return self.labels.too_long
            case _:
                return "cut"

    @property
    def needs_targets(self) -> bool:
        """True for objectives that need the second member of documents."""
        return self.objective in ("chat", "labels")

    @property
    def parts_attention(self) -> bool:
        """True where positions attend only within their document."""
        return self.reset_attention or self.objective == "chat"

    @property
    def parts_positions(self) -> bool:
        """True where positions start again at each document."""
        return self.reset_positions or self.objective == "chat"
