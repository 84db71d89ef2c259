"""What a sample's tokens are to be predicted from: an objective turns a sample into one row of a batch."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from llmtrain.config.schema import DataConfig
from llmtrain.data.batch import IGNORED_LABEL
from llmtrain.data.pack import PackedSample, document_numbers, document_positions
from llmtrain.data.stream import Sample

Objective = Callable[[Sample, DataConfig], PackedSample]


def causal(sample: Sample, data: DataConfig) -> PackedSample:
    """Each position predicts the next token of the stream.

    With data.reset_attention no position may see the document before its own, so the first token of a document
    cannot be predicted from anything and is no target.
    """
    seq_len = len(sample.tokens) - 1
    labels_S = sample.tokens[1:]
    segments_S = None
    if data.reset_attention:
        segments_S = document_numbers(sample.document_starts, seq_len)
        labels_S = labels_S.copy()
        labels_S[sample.document_starts[sample.document_starts > 0] - 1] = IGNORED_LABEL
    if data.reset_positions:
        positions_S = document_positions(sample.document_starts, seq_len)
    else:
        positions_S = np.arange(seq_len)
    return PackedSample(sample.tokens[:-1], labels_S, positions_S, segments_S)


OBJECTIVES: dict[str, Objective] = {"causal": causal}


def pack_sample(sample: Sample, data: DataConfig) -> PackedSample:
    """A sample as the row of a batch that data.objective makes of it; a blank one has no targets."""
    row = OBJECTIVES[data.objective](sample, data)
    return replace(row, labels_S=np.full_like(row.labels_S, IGNORED_LABEL)) if sample.blank else row
