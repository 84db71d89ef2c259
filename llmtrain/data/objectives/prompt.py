"""The places of a soft prompt before a sample: the model replaces their embeddings."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from llmtrain.data.objectives.causal import PackedSample
from llmtrain.values.batch import IGNORED_LABEL


def with_prompt(row: PackedSample, length: int) -> PackedSample:
    """A row behind `length` places that are no targets and that the first document sees; an encoder's input, where
    there is one."""
    if row.encoder_tokens_T is not None:
        segments_T = row.encoder_segments_T
        return replace(
            row,
            encoder_tokens_T=_behind(row.encoder_tokens_T, length, 0),
            encoder_segments_T=None if segments_T is None else _behind(segments_T, length, int(segments_T[0])),
        )
    segments_S = row.segments_S
    return replace(
        row,
        # Any token will do.
        tokens_S=_behind(row.tokens_S, length, 0),
        labels_S=_behind(row.labels_S, length, IGNORED_LABEL),
        positions_S=np.concatenate((np.arange(length), row.positions_S + length)),
        segments_S=None if segments_S is None else _behind(segments_S, length, int(segments_S[0])),
        token_types_S=None if row.token_types_S is None else _behind(row.token_types_S, length, 0),
        prefix=None if row.prefix is None else row.prefix + length,
    )


def _behind(row: NDArray[np.int64], length: int, value: int) -> NDArray[np.int64]:
    return np.concatenate((np.full(length, value, np.int64), row))
