"""How long the sequences are that objectives make of a sample. Pure arithmetic.

Every sample of a run has the same shape: pipelines exchange tensors of a size that both sides know.
"""

from dataclasses import dataclass

from llmtrain.config.data import CorruptionConfig, DataConfig, DenoiserConfig, PrefixConfig

MULTIPLE = 8
"""Lengths that follow from shares are padded to this, whatever the layout: no number depends on the layout."""


FIM_SENTINELS = 3
"""For prefix, middle and suffix."""

NUM_SENTINELS = 100
"""As many as T5 has; where fewer are needed, the others are there for fine-tuning."""


@dataclass(frozen=True)
class Lengths:
    """Positions of the main sequence (an encoder_decoder's decoder), and of its encoder, 0 in other families."""

    main: int
    encoder: int = 0


@dataclass(frozen=True)
class SpanCounts:
    """The tokens that span corruption takes out of a window, and the spans that they lie in."""

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


def prefix_bounds(window: int, prefix: PrefixConfig) -> tuple[int, int]:
    """Tokens of the shortest and of the longest prefix: one at least, and one token at least follows it."""
    least = min(max(int(window * prefix.min_share), 1), window - 1)
    return least, min(max(int(window * prefix.max_share), least), window - 1)


def num_sentinels(data: DataConfig) -> int:
    """How many sentinels the objective uses, those that stand for a mode included."""
    match data.objective:
        case "span_corruption":
            return span_counts(data.seq_len, data.span_corruption).spans
        case "ul2":
            modes = [denoiser.mode_token + 1 for denoiser in data.ul2.denoisers if denoiser.mode_token is not None]
            return max([num_spans(data.seq_len, denoiser) for denoiser in data.ul2.denoisers] + modes)
        case "fim":
            return FIM_SENTINELS
        case _:
            return 0


def num_spans(window: int, denoiser: DenoiserConfig) -> int:
    return 1 if denoiser.kind == "prefix" else span_counts(window, denoiser).spans


def sample_lengths(family: str, data: DataConfig) -> Lengths:
    """Lengths of a run's sequences, padding included."""
    if family != "encoder_decoder":
        return Lengths(data.seq_len)
    found = _possible_lengths(data)
    return Lengths(_padded(max(f.main for f in found)), _padded(max(f.encoder for f in found)))


def shortest_lengths(data: DataConfig) -> Lengths:
    """Of an encoder_decoder's sequences, without padding; which of the two is shortest may differ by sample."""
    found = _possible_lengths(data)
    return Lengths(min(f.main for f in found), min(f.encoder for f in found))


def _possible_lengths(data: DataConfig) -> list[Lengths]:
    """Exact lengths of an encoder_decoder's samples, the extremes at least."""
    match data.objective:
        case "prefix":
            bounds = prefix_bounds(data.seq_len, data.prefix)
            return [Lengths(data.seq_len - length + 1, length + 1) for length in bounds]
        case "ul2":
            return [denoised_lengths(data.seq_len, denoiser) for denoiser in data.ul2.denoisers]
        case _:
            return [corrupted_lengths(data.seq_len, data.span_corruption)]


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
