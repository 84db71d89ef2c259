"""Rows whose positions each predict the next token, as they stand or filled in the middle; and rows stacked to a batch.

Shape suffixes: B micro-batch, S sequence, T the encoder's sequence in an encoder-decoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from llmtrain.config.data import DataConfig
from llmtrain.config.sequence_lengths import FIM_SENTINELS
from llmtrain.data.row_config import RowConfig, SampleRandom
from llmtrain.data.stream import Sample
from llmtrain.values.batch import IGNORED_LABEL, Batch


@dataclass  # not frozen, as Sample is not
class PackedSample:
    """One row of a batch; see Batch for what the arrays mean."""

    tokens_S: NDArray[np.int64]
    labels_S: NDArray[np.int64]
    positions_S: NDArray[np.int64]
    segments_S: NDArray[np.int64] | None = None
    prefix: int | None = None
    encoder_tokens_T: NDArray[np.int64] | None = None
    encoder_segments_T: NDArray[np.int64] | None = None
    token_types_S: NDArray[np.int64] | None = None


def causal_row(tokens: NDArray[np.int64], document_starts: NDArray[np.int64], data: DataConfig) -> PackedSample:
    """The row of seq_len + 1 tokens of which each position predicts the next.

    Where attention keeps documents apart no position may see the document before its own, so the first token of a
    document cannot be predicted from anything and is not a target.
    """
    seq_len = len(tokens) - 1
    labels_S = tokens[1:]
    segments_S = None
    if data.parts_attention:
        segments_S = document_numbers(document_starts, seq_len)
        labels_S = labels_S.copy()
        labels_S[document_starts[document_starts > 0] - 1] = IGNORED_LABEL
    return PackedSample(tokens[:-1], labels_S, sample_positions(document_starts, data, seq_len), segments_S)


def sample_positions(document_starts: NDArray[np.int64], data: DataConfig, seq_len: int) -> NDArray[np.int64]:
    """Positions [seq_len] that count through, or begin again at each document."""
    return document_positions(document_starts, seq_len) if data.parts_positions else counted(seq_len)


@lru_cache(maxsize=4)
def counted(seq_len: int) -> NDArray[np.int64]:
    """Positions [seq_len] of a sample that is one: the same array for all, which nobody may write to."""
    positions = np.arange(seq_len)
    positions.setflags(write=False)
    return positions


def document_positions(document_starts: NDArray[np.int64], seq_len: int) -> NDArray[np.int64]:
    """Positions [seq_len] that count from 0 at each document, and at the sample's own begin."""
    bounds = _bounds(document_starts, seq_len)
    return np.arange(seq_len) - np.repeat(bounds[:-1], bounds[1:] - bounds[:-1])


def document_numbers(document_starts: NDArray[np.int64], seq_len: int) -> NDArray[np.int64]:
    """The number [seq_len] of each position's document among those in the sample, from 0."""
    bounds = _bounds(document_starts, seq_len)
    return np.repeat(np.arange(len(bounds) - 1), bounds[1:] - bounds[:-1])


def _bounds(document_starts: NDArray[np.int64], seq_len: int) -> NDArray[np.int64]:
    """The begins of the parts of a sample, and its end; the first part may belong to a document begun before."""
    inside = document_starts[(document_starts > 0) & (document_starts < seq_len)]
    return np.concatenate(([0], inside, [seq_len]))


def stack_samples(rows: Sequence[PackedSample], first_sample: int) -> Batch:
    """A micro-batch of int64 tensors, in pinned memory where there is a GPU to copy it to."""
    positions = [row.positions_S for row in rows]
    first = positions[0]  # where it is the one that counts through, those of all rows of all batches are
    return Batch(
        tokens_BS=_tensor([row.tokens_S for row in rows]),
        labels_BS=_tensor([row.labels_S for row in rows]),
        positions_BS=counted_rows(len(rows), len(first)) if first is counted(len(first)) else _tensor(positions),
        segments_BS=_tensor_or_none([row.segments_S for row in rows]),
        first_sample=first_sample,
        prefix_B=_tensor_or_none([None if row.prefix is None else np.array(row.prefix) for row in rows]),
        encoder_tokens_BT=_tensor_or_none([row.encoder_tokens_T for row in rows]),
        encoder_segments_BT=_tensor_or_none([row.encoder_segments_T for row in rows]),
        token_types_BS=_tensor_or_none([row.token_types_S for row in rows]),
    )


def _tensor_or_none(rows: Sequence[NDArray[np.int64] | None]) -> torch.Tensor | None:
    """None where no row has one: all have it, or none has, by the run's configuration."""
    present = [row for row in rows if row is not None]
    assert len(present) in (0, len(rows))
    return _tensor(present) if present else None


@lru_cache(maxsize=4)
def counted_rows(num_rows: int, seq_len: int) -> torch.Tensor:
    """`counted` as the positions [B, S] of a batch: the same tensor for all, as nobody writes to a batch."""
    return _tensor([counted(seq_len)] * num_rows)


def _tensor(rows: Sequence[NDArray[np.int64]]) -> torch.Tensor:
    # Pinned memory lets `Batch.to` copy without waiting for the device.
    tensor = torch.empty((len(rows), *rows[0].shape), dtype=torch.int64, pin_memory=torch.cuda.is_available())
    stacked = tensor.numpy()
    for number, row in enumerate(rows):
        stacked[number] = row
    return tensor


Tokens = NDArray[np.int64]


def fim(sample: Sample, row_config: RowConfig) -> PackedSample:
    """Documents of the window are cut in three at random tokens with probability fim.rate; then as causal.

    PSM: <prefix> prefix <suffix> suffix <middle> middle. SPM: <prefix> <suffix> suffix <middle> prefix middle (the
    paper's second variant). The window keeps its length and documents their places: a document that is cut loses its
    last three tokens before its end of sequence, whose places the sentinels take. Each part of a document that lies in
    the window counts as a document; one of three tokens or less is left as it is.
    """
    draws = row_config.draws(sample.number)
    inside = sample.document_starts[sample.document_starts > 0]
    text, padding = np.split(sample.tokens, [len(sample.tokens) - sample.padding])
    parts = [_rearranged(part, row_config, draws) for part in np.split(text, inside)]
    return causal_row(np.concatenate([*parts, padding]), sample.document_starts, row_config.data)


def _rearranged(part: Tokens, row_config: RowConfig, draws: SampleRandom) -> Tokens:
    config = row_config.data.fim
    # As many draws for every part, so that what happens to one does not depend on those before it.
    cut, suffix_first, *places = draws.uniform(4).tolist()
    # What stands before every document stays there.
    begin = len(row_config.bos_ids) if tuple(part[: len(row_config.bos_ids)].tolist()) == row_config.bos_ids else 0
    head, part = part[:begin], part[begin:]
    length = len(part) - int(len(part) > 0 and part[-1] == row_config.eos_id)
    room = length - FIM_SENTINELS
    if room < 1 or cut >= config.rate:
        return np.concatenate((head, part))
    first, second = sorted(int(place * (room + 1)) for place in places)
    prefix, middle, suffix = part[:first], part[first:second], part[second:room]
    before, mid, behind = row_config.sentinels[:FIM_SENTINELS, None]
    if suffix_first < config.suffix_first_share:
        moved = (before, behind, suffix, mid, prefix, middle)
    else:
        moved = (before, prefix, behind, suffix, mid, middle)
    return np.concatenate((head, *moved, part[length:]))
