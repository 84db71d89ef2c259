"""Noise in what a model reads, never in what it is to predict: tokens and words dropped, replaced, swapped.

The operations are those of EDA (Wei and Zou 2019, "Easy Data Augmentation", section 2) that need no thesaurus, and the
noising of a language model's inputs (Xie et al. 2017, "Data Noising as Smoothing"). A column of a row is a token that
is read and the target at its position: a word that is dropped takes its columns along, so that every target that is
left is the right one. The draws are keyed by (seed, sample) and are others than those of the objective.

Shape suffixes: S a row's sequence, W its words, C the columns that are left.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from llmtrain.data.objectives.causal import PackedSample, counted
from llmtrain.data.objectives.masking import find_words
from llmtrain.data.row_config import RowConfig
from llmtrain.values.batch import IGNORED_LABEL, PADDING

Tokens = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Targets:
    """The text that a row's words are found in, and the places whose words are neither dropped nor replaced; where they
    are `fixed`, nor swapped."""

    text_S: Tokens
    places_S: Flags
    fixed: bool = False


@dataclass(frozen=True)
class Noised:
    """The tokens of a row with words replaced, the columns that are left of it in their new order, and where a target
    within a word went that was replaced: nothing that is read leads to it."""

    tokens_S: Tokens
    columns_C: Tokens
    lost_S: Flags

    def filled(self, values_S: Tokens, filler: int) -> Tokens:
        """Values by column, as many as before, the end filled up."""
        left = values_S[self.columns_C]
        return np.concatenate((left, np.full(len(values_S) - len(left), filler, np.int64)))


def augmented(row: PackedSample, number: int, row_config: RowConfig) -> PackedSample:
    """The row of sample `number` with noise in its text: an encoder-decoder's input, else what the model reads."""
    if row.encoder_tokens_T is not None:
        nothing_T = np.zeros(len(row.encoder_tokens_T), bool)
        noised = _noised(row.encoder_tokens_T, Targets(row.encoder_tokens_T, nothing_T), number, row_config)
        segments_T = row.encoder_segments_T
        return replace(
            row,
            encoder_tokens_T=noised.filled(noised.tokens_S, row_config.pad_id),
            encoder_segments_T=None if segments_T is None else noised.filled(segments_T, PADDING),
        )
    targets = Targets(row.tokens_S, np.zeros(len(row.tokens_S), bool))
    if row_config.data.objective == "masked":
        # A hidden token's target is the token itself: a word that has one is what is to be predicted, and stays.
        hidden_S = row.labels_S != IGNORED_LABEL
        targets = Targets(np.where(hidden_S, row.labels_S, row.tokens_S), hidden_S)
    elif row_config.data.objective == "labels":
        targets = Targets(row.tokens_S, row.labels_S != IGNORED_LABEL, fixed=True)  # where a label is predicted
    noised = _noised(row.tokens_S, targets, number, row_config)
    labels_S = np.where(noised.lost_S, IGNORED_LABEL, row.labels_S)
    prefix = None if row.prefix is None else max(1, int((noised.columns_C < row.prefix).sum()))
    return replace(
        row,
        tokens_S=noised.filled(noised.tokens_S, row_config.eos_id),
        labels_S=noised.filled(labels_S, IGNORED_LABEL),
        positions_S=_recounted(row.positions_S, noised.columns_C),
        segments_S=None if row.segments_S is None else noised.filled(row.segments_S, PADDING),
        prefix=prefix,
        token_types_S=None if row.token_types_S is None else noised.filled(row.token_types_S, 0),
    )


def _noised(tokens_S: Tokens, targets: Targets, number: int, row_config: RowConfig) -> Noised:
    """Every word has its draws, whatever happens to the others."""
    assert row_config.pieces is not None, "augmentation needs the tokenizer's pieces"
    augment, draws = row_config.data.augment, row_config.draws(number, "augment")
    text_S, hidden_S = targets.text_S, targets.places_S
    usable_S = _usable(text_S, row_config)
    words = find_words(np.where(usable_S, text_S, 0), usable_S, np.zeros(0, np.int64), row_config.pieces)
    num_words, sizes_W = len(words.begins), words.ends - words.begins
    # The word of every column of one; the others have the number behind the last.
    word_S = np.full(len(tokens_S), num_words)
    word_S[usable_S] = np.repeat(np.arange(num_words), sizes_W)
    free_W = np.append(np.bincount(word_S[hidden_S], minlength=num_words + 1)[:num_words] == 0, False)
    replaced_W, swapped_W, deleted_W = (draws.uniform(num_words + 1) for _ in range(3))
    replaced_S = ((replaced_W < augment.replace_words) & free_W)[word_S]
    begins_S = np.zeros(len(tokens_S), bool)
    begins_S[words.begins] = True
    others_S = _random_pieces(draws.uniform(len(tokens_S)), begins_S, row_config)
    gone_S = ((deleted_W < augment.delete_words) & free_W)[word_S]
    gone_S |= (draws.uniform(len(tokens_S)) < augment.drop_tokens) & usable_S & ~hidden_S
    order_S = np.arange(len(tokens_S))
    done = 0
    moves_W = free_W | (not targets.fixed)
    wanted_W = (swapped_W < augment.swap_words) & moves_W & np.append(moves_W[1:], False)
    for word in np.flatnonzero(wanted_W[: max(0, num_words - 1)]).tolist():
        begin, middle, end = words.begins[word], words.ends[word], words.ends[word + 1]
        if word >= done and middle == words.begins[word + 1]:
            order_S[begin:end] = np.concatenate((np.arange(middle, end), np.arange(begin, middle)))
            done = word + 2
    lasts_S = np.zeros(len(tokens_S), bool)
    lasts_S[words.ends - 1] = True
    columns_C = order_S[~gone_S[order_S]]
    return Noised(np.where(replaced_S, others_S, tokens_S), columns_C, replaced_S & ~lasts_S)


def _usable(tokens_S: Tokens, row_config: RowConfig) -> Flags:
    """Tokens of text: no special one, no sentinel."""
    assert row_config.pieces is not None
    special = row_config.pieces.special
    usable_S = (tokens_S < len(special)) & ~special[np.minimum(tokens_S, len(special) - 1)]
    sentinels = row_config.data.special_tokens.sentinels
    return usable_S & ~np.isin(tokens_S, sentinels) if sentinels else usable_S


def _random_pieces(draws_S: NDArray[np.float64], begins_S: Flags, row_config: RowConfig) -> Tokens:
    """An ordinary piece for every column, which begins a word where the word there begins, and nowhere else."""
    assert row_config.pieces is not None
    ordinary = ~row_config.pieces.special
    found_S = np.zeros(len(draws_S), np.int64)
    for begins in (True, False):
        pieces = np.flatnonzero(ordinary & (row_config.pieces.begins_word == begins))
        # Some tokenizers do not mark words, and have pieces of one kind only.
        pieces = pieces if len(pieces) else np.flatnonzero(ordinary)
        places = begins_S == begins
        found_S[places] = pieces[(draws_S[places] * len(pieces)).astype(np.int64)]
    return found_S


def _recounted(positions_S: Tokens, columns_C: Tokens) -> Tokens:
    """Positions without gaps: those of a sample that is one count through, others begin anew with every document."""
    if positions_S is counted(len(positions_S)):
        return positions_S
    document_S = np.cumsum(positions_S == 0)
    left = document_S[columns_C]
    left = np.concatenate((left, np.full(len(positions_S) - len(left), document_S[-1])))
    _, firsts, sizes = np.unique(left, return_index=True, return_counts=True)
    return np.arange(len(left)) - np.repeat(firsts, sizes)
