"""From samples to the arrays of a micro-batch: positions, document numbers, and stacking.

Shape suffixes: B micro-batch, S sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from llmtrain.data.batch import Batch


@dataclass(frozen=True)
class PackedSample:
    """One row of a batch; see Batch for what the arrays mean."""

    tokens_S: NDArray[np.int64]
    labels_S: NDArray[np.int64]
    positions_S: NDArray[np.int64]
    segments_S: NDArray[np.int64] | None = None


def document_positions(document_starts: NDArray[np.int64], seq_len: int) -> NDArray[np.int64]:
    """Positions [seq_len] that count from 0 at each document, and at the sample's own begin."""
    bounds = _bounds(document_starts, seq_len)
    return np.arange(seq_len) - np.repeat(bounds[:-1], bounds[1:] - bounds[:-1])


def document_numbers(document_starts: NDArray[np.int64], seq_len: int) -> NDArray[np.int64]:
    """The number [seq_len] of each position's document among those in the sample, from 0."""
    bounds = _bounds(document_starts, seq_len)
    return np.repeat(np.arange(len(bounds) - 1), bounds[1:] - bounds[:-1])


def _bounds(document_starts: NDArray[np.int64], seq_len: int) -> NDArray[np.int64]:
    """Where the parts of a sample begin, and its end; the first part may belong to a document begun before."""
    inside = document_starts[(document_starts > 0) & (document_starts < seq_len)]
    return np.concatenate(([0], inside, [seq_len]))


def stack_samples(rows: Sequence[PackedSample], first_sample: int) -> Batch:
    """A micro-batch of int64 tensors, in pinned memory where there is a GPU to copy it to."""
    segments = [row.segments_S for row in rows if row.segments_S is not None]
    return Batch(
        tokens_BS=_tensor([row.tokens_S for row in rows]),
        labels_BS=_tensor([row.labels_S for row in rows]),
        positions_BS=_tensor([row.positions_S for row in rows]),
        segments_BS=_tensor(segments) if segments else None,
        first_sample=first_sample,
    )


def _tensor(rows: Sequence[NDArray[np.int64]]) -> torch.Tensor:
    tensor = torch.from_numpy(np.stack(rows))
    return tensor.pin_memory() if torch.cuda.is_available() else tensor
