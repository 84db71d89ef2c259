"""The table of objectives: each turns a sample into one row of a batch.

An objective is a pure function of the sample, its number and what the run's rows are made with: the same on every rank,
in every layout and after every resume.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from llmtrain.data.objectives.augment import augmented
from llmtrain.data.objectives.causal import PackedSample, causal_row, fim
from llmtrain.data.objectives.chat import chat
from llmtrain.data.objectives.corruption import prefix_length, span_corruption, split_at_prefix, ul2
from llmtrain.data.objectives.labels import labels
from llmtrain.data.objectives.masking import masked
from llmtrain.data.objectives.prompt import with_prompt
from llmtrain.data.row_config import RowConfig
from llmtrain.data.stream import Sample
from llmtrain.values.batch import IGNORED_LABEL, PADDING

Objective = Callable[[Sample, RowConfig], PackedSample]


def causal(sample: Sample, row_config: RowConfig) -> PackedSample:
    """Each position predicts the next token of the stream."""
    return causal_row(sample.tokens, sample.document_starts, row_config.data)


def prefix(sample: Sample, row_config: RowConfig) -> PackedSample:
    """A decoder sees the prefix from both sides, so only what follows it is predicted; an encoder reads it whole."""
    if row_config.family == "encoder_decoder":
        return split_at_prefix(sample, row_config)
    row, length = causal(sample, row_config), prefix_length(sample, row_config)
    labels_S = row.labels_S.copy()
    labels_S[: length - 1] = IGNORED_LABEL  # the last position of the prefix predicts the first token behind it
    return replace(row, labels_S=labels_S, prefix=length)


OBJECTIVES: dict[str, Objective] = {
    "causal": causal,
    "masked": masked,
    "span_corruption": span_corruption,
    "ul2": ul2,
    "prefix": prefix,
    "fim": fim,
    "chat": chat,
    "labels": labels,
}


def pack_sample(sample: Sample, row_config: RowConfig) -> PackedSample:
    """A sample as the row of a batch that data.objective makes of it; a blank one has no targets."""
    row = OBJECTIVES[row_config.data.objective](sample, row_config)
    if row_config.data.packing_kind != "none" or row_config.data.augment.shortens:
        row = _filled_up(row, sample.padding, row_config.family)
    if row_config.augmented and not sample.blank:
        row = augmented(row, sample.number, row_config)
    if row_config.prompt_tokens:
        row = with_prompt(row, row_config.prompt_tokens)
    return replace(row, labels_S=np.full_like(row.labels_S, IGNORED_LABEL)) if sample.blank else row


def _filled_up(row: PackedSample, padding: int, family: str) -> PackedSample:
    """A row of a sample whose last `padding` tokens are none: no targets, and seen by no position before them.

    A decoder's positions see none behind them; to an encoder they are hidden as padding, in every row of the run.
    """
    labels_S, segments_S = row.labels_S, row.segments_S
    if segments_S is None and family == "encoder":
        segments_S = np.zeros(len(labels_S), np.int64)
    if padding:
        labels_S = labels_S.copy()
        labels_S[-padding:] = IGNORED_LABEL  # they are the tokens from the second on
    if segments_S is not None and padding > 1:
        segments_S[len(segments_S) - padding + 1 :] = PADDING
    return replace(row, labels_S=labels_S, segments_S=segments_S)
