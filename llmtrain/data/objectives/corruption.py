"""Text for an encoder_decoder: spans are taken out of the input, and are the target (Raffel et al. 2020, 3.1.4).

Shape suffixes: S the decoder's sequence, T the encoder's; W a window, the first seq_len tokens of a sample.
"""

import numpy as np
from numpy.typing import NDArray

from llmtrain.config.data import CorruptionConfig, DenoiserConfig
from llmtrain.config.sequence_lengths import SpanCounts, prefix_bounds, span_counts
from llmtrain.data.objectives.causal import PackedSample, counted
from llmtrain.data.row_config import RowConfig, SampleRandom
from llmtrain.data.stream import Sample
from llmtrain.values.batch import IGNORED_LABEL, PADDING

Tokens = NDArray[np.int64]


def span_corruption(sample: Sample, row_config: RowConfig) -> PackedSample:
    """Input: the window with a sentinel in place of each span. Target: each sentinel and its span. Both with an end."""
    draws = row_config.draws(sample.number)
    return encoder_decoder_row(
        *corrupted(sample.tokens[:-1], row_config.data.span_corruption, row_config, draws), row_config
    )


def ul2(sample: Sample, row_config: RowConfig) -> PackedSample:
    """One of the denoisers, drawn per sample with their weights (Tay et al. 2022), behind the token of its mode."""
    window_W, draws = sample.tokens[:-1], row_config.draws(sample.number)
    denoisers = row_config.data.ul2.denoisers
    turns = np.cumsum([denoiser.weight for denoiser in denoisers])
    denoiser = denoisers[int(np.searchsorted(turns, draws.below(int(turns[-1])), side="right"))]
    if denoiser.kind == "prefix":
        kept = len(window_W) - span_counts(len(window_W), denoiser).tokens
        sentinel, end = row_config.sentinels[:1], [row_config.eos_id]
        input_T = np.concatenate((window_W[:kept], sentinel, end))
        target_S = np.concatenate((sentinel, window_W[kept:], end))
    else:
        input_T, target_S = corrupted(window_W, denoiser, row_config, draws)
    if denoiser.mode_token is not None:
        input_T = np.concatenate((row_config.sentinels[denoiser.mode_token, None], input_T))
    return encoder_decoder_row(input_T, target_S, row_config)


def split_at_prefix(sample: Sample, row_config: RowConfig) -> PackedSample:
    """Input: a prefix of the window. Target: the rest. Both with an end."""
    window_W = sample.tokens[:-1]
    length, end = prefix_length(sample, row_config), [row_config.eos_id]
    return encoder_decoder_row(
        np.concatenate((window_W[:length], end)), np.concatenate((window_W[length:], end)), row_config
    )


def prefix_length(sample: Sample, row_config: RowConfig) -> int:
    """Uniform between the bounds that data.prefix gives."""
    least, most = prefix_bounds(len(sample.tokens) - 1, row_config.data.prefix)
    return least + row_config.draws(sample.number).below(most - least + 1)


def corrupted(
    window_W: Tokens, corruption: CorruptionConfig | DenoiserConfig, row_config: RowConfig, draws: SampleRandom
) -> tuple[Tokens, Tokens]:
    """Input and target of span corruption."""
    counts = span_counts(len(window_W), corruption)
    is_noise_W = noise_mask(len(window_W), counts, draws)
    sentinels, end = row_config.sentinels[: counts.spans], [row_config.eos_id]
    first_W = np.concatenate(([False], is_noise_W[1:] & ~is_noise_W[:-1]))  # a window never begins with a span
    firsts = np.flatnonzero(first_W)
    input_W = window_W.copy()
    input_W[firsts] = sentinels
    input_T = np.concatenate((input_W[~is_noise_W | first_W], end))
    noise = window_W[is_noise_W]
    # A span's first token, at place w of the window, is token cumsum[w] - 1 of the noise: its sentinel goes before it.
    target_S = np.concatenate((np.insert(noise, np.cumsum(is_noise_W)[firsts] - 1, sentinels), end))
    return input_T, target_S


def noise_mask(length: int, counts: SpanCounts, draws: SampleRandom) -> NDArray[np.bool_]:
    """T5's random_spans_noise_mask: [length], true where a token is taken out.

    Text and spans take turns, text first and a span last. Their numbers and the tokens in each kind are fixed; every
    partition into such parts, none of them empty, has the same chance. So a single span is the end of the window.
    """
    noise = _partition(counts.tokens, counts.spans, draws)
    text = _partition(length - counts.tokens, counts.spans, draws)
    parts = np.stack((text, noise), axis=1).ravel()
    return np.repeat(np.arange(2 * counts.spans) % 2 == 1, parts)


def _partition(items: int, parts: int, draws: SampleRandom) -> Tokens:
    """[parts] of at least one, with the sum `items`."""
    cuts = np.sort(draws.order(items - 1)[: parts - 1]) + 1
    return np.diff(np.concatenate(([0], cuts, [items])))


def encoder_decoder_row(input_T: Tokens, target_S: Tokens, row_config: RowConfig) -> PackedSample:
    """Both sides filled up to the lengths of the run. The decoder reads the target moved by one behind the pad token.

    Segments say what is padding; a run in which no sample needs any has none.
    """
    lengths, pad = row_config.lengths, row_config.pad_id
    decoder_S = np.concatenate(([pad], target_S[:-1]))
    padded = row_config.is_padded
    return PackedSample(
        tokens_S=_filled(decoder_S, lengths.main, pad),
        labels_S=_filled(target_S, lengths.main, IGNORED_LABEL),
        positions_S=counted(lengths.main),
        segments_S=_filled(np.zeros_like(decoder_S), lengths.main, PADDING) if padded.main else None,
        encoder_tokens_T=_filled(input_T, lengths.encoder, pad),
        encoder_segments_T=_filled(np.zeros_like(input_T), lengths.encoder, PADDING) if padded.encoder else None,
    )


def _filled(values: Tokens, length: int, filler: int) -> Tokens:
    assert len(values) <= length
    return np.concatenate((values, np.full(length - len(values), filler, np.int64)))
