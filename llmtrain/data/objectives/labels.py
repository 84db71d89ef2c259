"""Texts with labels: the rows of heads that predict what is to be said of a text, in place of its tokens.

A label is the target of the position that it is predicted at, so that targets are counted and losses added up as those
of tokens are. What the labels of a document mean, its shards say (storage/targets.py).

Shape suffixes: S sequence.
"""

import numpy as np

from llmtrain.data.objectives.causal import PackedSample, counted
from llmtrain.data.row_config import RowConfig
from llmtrain.data.stream import Sample
from llmtrain.values.batch import IGNORED_LABEL, PADDING


def labels(sample: Sample, row_config: RowConfig) -> PackedSample:
    """The row of one text, padding behind it.

    classification: the label is the target of an encoder's first position, of a decoder's last one. tagging: each word
    has its label at its first token. qa: the first two targets are the positions where the answer begins and ends.
    """
    assert row_config.labels is not None, "data/target_sources.py: the data of the objective has labels"
    record, seq_len = row_config.labels, len(sample.tokens) - 1
    length = seq_len - sample.padding  # the end of sequence behind the text is no part of it
    tokens_S = sample.tokens[:-1]
    labels_S = np.full(seq_len, IGNORED_LABEL, np.int64)
    if sample.targets is not None:  # else it is a blank one
        match record.task:
            case "classification":
                labels_S[0 if record.family == "encoder" else length - 1] = sample.targets[0]
            case "tagging":
                labels_S[:length] = sample.targets  # a token without one has NO_LABEL, which is the same number
            case "qa":
                labels_S[:2] = sample.targets[0], sample.targets[1] - 1
    segments_S = np.where(np.arange(seq_len) < length, 0, PADDING)
    types_S = None
    if record.separator_id is not None:
        is_separator_S = tokens_S == record.separator_id
        # The separator behind the first text still belongs to it; that behind the second one to that.
        types_S = np.where(segments_S == PADDING, 0, np.minimum(np.cumsum(is_separator_S) - is_separator_S, 1))
    return PackedSample(tokens_S, labels_S, counted(seq_len), segments_S, token_types_S=types_S)
