"""How long the sequences are that objectives make of a sample. Pure arithmetic.

Every sample of a run has the same shape: pipelines exchange tensors of a size that both sides know.
"""

from dataclasses import dataclass

from llmtrain.config.objective import CorruptionConfig, DenoiserConfig
from llmtrain.config.schema import DataConfig

MULTIPLE = 8
"""Lengths that follow from shares are padded to this, whatever the layout: no number depends on the layout."""


@dataclass(frozen=True)
class Lengths:
    """Positions of the main sequence (an encoder_decoder's decoder), and of its encoder, 0 in other families."""

    main: int
    encoder: int = 0


@dataclass(frozen=True)
class SpanCounts:
    """What span corruption takes out of a window: tokens, and spans that they lie in."""

    tokens: int
    spans: int


def span_counts(window: int, corruption: CorruptionConfig | DenoiserConfig) -> SpanCounts:
    """The same for every sample (Raffel et al. 2020): between 1 and window - 1 tokens, each span with at least one
    token in it and one before it."""
    tokens = min(max(round(window * corruption.density), 1), window - 1)
    spans = min(max(round(tokens / corruption.mean_length), 1), tokens, window - tokens)
    return SpanCounts(tokens, spans)


def corrupted_lengths(window: int, corruption: CorruptionConfig | DenoiserConfig) -> Lengths:
    """Exact lengths of target and input, each with the sentinels and an end of sequence."""
    counts = span_counts(window, corruption)
    return Lengths(counts.tokens + counts.spans + 1, window - counts.tokens + counts.spans + 1)


def sample_lengths(family: str, data: DataConfig) -> Lengths:
    """Lengths of a run's sequences, padding included."""
    if family != "encoder_decoder":
        return Lengths(data.seq_len)
    match data.objective:
        case "prefix":
            least, most = int(data.seq_len * data.prefix.min_share), int(data.seq_len * data.prefix.max_share)
            found = [Lengths(data.seq_len - max(1, least) + 1, most + 1)]
        case "ul2":
            found = [denoised_lengths(data.seq_len, denoiser) for denoiser in data.ul2.denoisers]
        case _:
            found = [corrupted_lengths(data.seq_len, data.span_corruption)]
    return Lengths(_padded(max(f.main for f in found)), _padded(max(f.encoder for f in found)))


def denoised_lengths(window: int, denoiser: DenoiserConfig) -> Lengths:
    """Exact lengths of target and input under one denoiser of UL2."""
    mode = 0 if denoiser.mode_token is None else 1
    if denoiser.kind == "prefix":
        taken = min(max(round(window * denoiser.density), 1), window - 1)
        # A sentinel stands for what is taken out.
        return Lengths(taken + 2, window - taken + 2 + mode)
    lengths = corrupted_lengths(window, denoiser)
    return Lengths(lengths.main, lengths.encoder + mode)


def _padded(length: int) -> int:
    return -(-length // MULTIPLE) * MULTIPLE
