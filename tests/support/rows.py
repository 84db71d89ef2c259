"""Samples and recipes for tests of objectives, over a vocabulary without a tokenizer."""

from typing import Any

import numpy as np

from llmtrain.config.data import DataConfig
from llmtrain.data.row_config import PieceTable, RowConfig
from llmtrain.data.stream import Sample
from tests.support.datasets import LABELS

EOS, PAD, MASK = 3, 0, 4
NUM_SPECIAL = 7
VOCAB_SIZE = 100
FIRST_SENTINEL = 1000

PIECES = PieceTable(
    special=np.arange(VOCAB_SIZE) < NUM_SPECIAL,
    begins_word=np.arange(VOCAB_SIZE) % 3 == 0,
)
"""A third of the tokens begin a word."""


def row_config_of(family: str, objective: str, seq_len: int, seed: int = 1, **keys: Any) -> RowConfig:
    """`keys` are those of the section data, which may hold sections of objectives."""
    special = {"mask": MASK, "pad": PAD, "sentinels": list(range(FIRST_SENTINEL, FIRST_SENTINEL + 600))}
    tree = {"train": [{"path": "none"}], "objective": objective, "seq_len": seq_len, "special_tokens": special, **keys}
    return RowConfig(DataConfig.model_validate(tree), seed, EOS, family, PIECES, labels=LABELS)


def sample_of(tokens: list[int] | np.ndarray, number: int = 0, blank: bool = False) -> Sample:
    """A window whose documents begin behind each end of sequence."""
    ids = np.asarray(tokens, np.int64)
    starts = np.flatnonzero(ids[:-1] == EOS) + 1
    return Sample(number, ids, starts, 0, 0, 0, number, blank)


def random_sample(number: int, seq_len: int, eos_share: float = 0.05) -> Sample:
    """A window of ordinary tokens and ends of sequence, by its number."""
    generator = np.random.default_rng(number)
    tokens = generator.integers(NUM_SPECIAL, VOCAB_SIZE, seq_len + 1)
    tokens[generator.random(seq_len + 1) < eos_share] = EOS
    return sample_of(tokens, number)
