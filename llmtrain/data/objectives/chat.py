"""Conversations: each position predicts the next token, and the targets are those that somebody is trained to say.

Which tokens the assistant says stands in the shards (see storage/targets.py): spans, in the order of the conversation.
A turn may have several, such as its thinking and its answer; the last of them ends with a token that ends turns.
"""

import numpy as np
from numpy.typing import NDArray

from llmtrain.config.data import ChatConfig
from llmtrain.data.objectives.causal import PackedSample, causal_row
from llmtrain.data.row_config import RowConfig
from llmtrain.data.stream import Sample
from llmtrain.values.batch import IGNORED_LABEL

Positions = NDArray[np.int64]


def chat(sample: Sample, row_config: RowConfig) -> PackedSample:
    """The row of whole conversations, which see nothing of each other. Token t is the target of position t - 1."""
    row = causal_row(sample.tokens, sample.document_starts, row_config.data)
    if row_config.data.chat.train_on == "all":
        trained = np.ones(len(sample.tokens), bool)
        # The end of sequence behind each conversation is no part of it. One that is cut has none.
        lasts = np.array([*sample.document_starts[1:], len(sample.tokens) - sample.padding]) - 1
        trained[lasts] = sample.tokens[lasts] != row_config.eos_id
        if not row_config.data.chat.train_on_end:
            trained &= ~np.isin(sample.tokens, row_config.end_ids)
    else:
        trained = trained_tokens(sample, row_config.data.chat, row_config.end_ids)
    row.labels_S = np.where(trained[1:], row.labels_S, IGNORED_LABEL)
    return row


def trained_tokens(sample: Sample, chat: ChatConfig, end_ids: tuple[int, ...]) -> NDArray[np.bool_]:
    """[seq_len + 1], true where the assistant's tokens are targets."""
    trained = np.zeros(len(sample.tokens), bool)
    if sample.targets is None:  # a blank sample
        return trained
    spans = np.minimum(sample.targets, len(sample.tokens))  # of a conversation that is cut
    spans = spans[spans[:, 0] < spans[:, 1]]
    lasts = spans[:, 1] - 1
    ends = np.isin(sample.tokens[lasts], end_ids)
    if chat.train_on == "last":
        spans, lasts, ends = (
            found[_of_last_turns(spans, ends, sample.document_starts)] for found in (spans, lasts, ends)
        )
    for begin, end in spans.tolist():
        trained[begin:end] = True
    if not chat.train_on_end:
        trained[lasts[ends]] = False
    return trained


def _of_last_turns(spans: Positions, ends: NDArray[np.bool_], document_starts: Positions) -> NDArray[np.bool_]:
    """[spans], true for those of the last turn of their conversation. A turn goes on until a span ends one."""
    conversation = document_starts.searchsorted(spans[:, 0], side="right")
    # The number of turns that have ended before a span; the last of its conversation is the one to keep.
    turn = np.cumsum(ends) - ends
    last = np.zeros(len(document_starts) + 1, np.int64)
    np.maximum.at(last, conversation, turn)
    return turn == last[conversation]
