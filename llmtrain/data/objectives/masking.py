"""Masked language modelling (Devlin et al. 2019): what is chosen, and what stands in its place.

Shape suffixes: S sequence, C chosen tokens.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmtrain.config.data import MaskedConfig
from llmtrain.data.objectives.causal import PackedSample, document_numbers, sample_positions
from llmtrain.data.row_config import PieceTable, RowConfig, SampleRandom
from llmtrain.data.stream import Sample
from llmtrain.values.batch import IGNORED_LABEL

Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class Words:
    """The words of a sample, in order: [words] where each begins and ends. Special tokens lie in none."""

    begins: NDArray[np.int64]
    ends: NDArray[np.int64]


def masked(sample: Sample, row_config: RowConfig) -> PackedSample:
    """The first seq_len tokens with some replaced; the original tokens of all chosen positions are the labels.

    As in BERT's own code, a sample has exactly round(probability x tokens) chosen tokens, special ones not counted, and
    at least one; each chosen position is then masked, replaced or kept by a draw of its own. Of a span, all positions
    are treated alike (Joshi et al. 2020, section 3.1). Special tokens, ends of sequence among them, are never chosen
    and never put in.
    """
    assert row_config.pieces is not None, "masked needs the tokenizer's pieces"
    data, original_S = row_config.data, sample.tokens[:-1]
    seq_len, draws = len(original_S), row_config.draws(sample.number)
    usable_S = ~row_config.pieces.special[original_S]
    chosen_C, unit_C = _chosen(original_S, usable_S, sample.document_starts, row_config, draws)
    tokens_S, labels_S = original_S.copy(), np.full(seq_len, IGNORED_LABEL, np.int64)
    labels_S[chosen_C] = original_S[chosen_C]
    tokens_S[chosen_C] = _replaced(original_S[chosen_C], unit_C, row_config, draws)
    segments_S = document_numbers(sample.document_starts, seq_len) if data.parts_attention else None
    return PackedSample(tokens_S, labels_S, sample_positions(sample.document_starts, data, seq_len), segments_S)


def _chosen(
    tokens_S: Tokens, usable_S: NDArray[np.bool_], document_starts: Tokens, row_config: RowConfig, draws: SampleRandom
) -> tuple[Tokens, Tokens]:
    """Chosen positions, and for each the number of what it is replaced together with."""
    assert row_config.pieces is not None
    masked, usable = row_config.data.masked, np.flatnonzero(usable_S)
    count = min(len(usable), max(1, round(masked.probability * len(usable))))
    if count == 0:
        return usable, usable
    if masked.unit == "token":
        return usable[draws.order(len(usable))[:count]], np.arange(count)
    words = find_words(tokens_S, usable_S, document_starts, row_config.pieces)
    if masked.unit == "word":
        chosen = _chosen_words(words, count, draws)
        return chosen, np.arange(len(chosen))
    return _chosen_spans(words, count, masked, draws)


def find_words(tokens_S: Tokens, usable_S: NDArray[np.bool_], document_starts: Tokens, pieces: PieceTable) -> Words:
    """Words begin where their piece says so, where a document does, and behind a special token."""
    after_special_S = np.concatenate(([True], ~usable_S[:-1]))
    begins_S = usable_S & (pieces.begins_word[tokens_S] | after_special_S)
    inside = document_starts[document_starts < len(tokens_S)]
    begins_S[inside] = usable_S[inside]
    # A word ends where the next one begins or a special token stands.
    is_end_S = np.concatenate(((begins_S | ~usable_S)[1:], [True]))
    return Words(np.flatnonzero(begins_S), np.flatnonzero(usable_S & is_end_S) + 1)


def _chosen_words(words: Words, count: int, draws: SampleRandom) -> Tokens:
    """Whole words in random order, but none that would lead beyond `count` tokens, as in BERT's own code.

    Where all words are longer, it is the first `count` pieces of the word that was drawn first.
    """
    parts: list[Tokens] = []
    room = count
    order = draws.order(len(words.begins))
    for begin, end in zip(words.begins[order].tolist(), words.ends[order].tolist(), strict=True):
        if end - begin <= room:
            parts.append(np.arange(begin, end))
            room -= end - begin
        if room == 0:
            break
    if not parts:
        begin = int(words.begins[order[0]])
        parts.append(np.arange(begin, begin + count))
    return np.concatenate(parts)


def _chosen_spans(words: Words, count: int, masked: MaskedConfig, draws: SampleRandom) -> tuple[Tokens, Tokens]:
    """Spans of whole words until there are `count` tokens, where the last span is cut (SpanBERT's own code).

    Lengths in words are geometric, without those above max_span. A span begins with the word of a token drawn from
    those not yet chosen, may run into an earlier span, and ends before a special token.
    """
    lengths = np.arange(1, masked.max_span + 1)
    shares = masked.span_probability * (1 - masked.span_probability) ** (lengths - 1)
    bounds = np.cumsum(shares / shares.sum())
    size = int(words.ends[-1])
    span_S = np.full(size, -1)
    free_S = np.zeros(size, bool)
    for begin, end in zip(words.begins, words.ends, strict=True):
        free_S[begin:end] = True
    # Numbers of three kinds: places in the sample (free, inside, taken), words, and the spans that tokens belong to.
    number, room = 0, count
    while room:
        length = int(np.searchsorted(bounds[:-1], draws.uniform(1)[0], side="right")) + 1
        free = np.flatnonzero(free_S)
        anchor = free[draws.below(len(free))]
        word = int(np.searchsorted(words.begins, anchor, side="right")) - 1
        last = word
        while last + 1 < min(word + length, len(words.begins)) and words.begins[last + 1] == words.ends[last]:
            last += 1
        inside = np.arange(words.begins[word], words.ends[last])
        taken = inside[free_S[inside]][:room]
        span_S[taken], free_S[taken] = number, False
        room, number = room - len(taken), number + 1
    chosen = np.flatnonzero(span_S >= 0)
    return chosen, span_S[chosen]


def _replaced(original_C: Tokens, unit_C: Tokens, row_config: RowConfig, draws: SampleRandom) -> Tokens:
    """The tokens at the chosen positions: the mask, a random one that is not special, or the original."""
    assert row_config.pieces is not None
    masked, count = row_config.data.masked, len(original_C)
    fate_C = draws.uniform(int(unit_C.max()) + 1)[unit_C] if count else np.zeros(0)
    ordinary = np.flatnonzero(~row_config.pieces.special)
    random_C = ordinary[(draws.uniform(count) * len(ordinary)).astype(np.int64)]
    replaced_C = np.where(fate_C < masked.mask_share + masked.random_share, random_C, original_C)
    return np.where(fate_C < masked.mask_share, row_config.mask_id, replaced_C)
