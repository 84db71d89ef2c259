"""What objectives need to know of a tokenizer's pieces: which are special, and which begin a word."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SPACE_MARKS = {"sentencepiece": "\u2581", "byte_level": "\u0120\u010a\u0109\u010d"}
"""First characters of pieces that begin with a space; a byte-level tokenizer has others for new line, tab, return."""

CONTINUATION = "##"
"""WordPiece marks pieces that go on with a word instead."""


@dataclass(frozen=True)
class PieceTable:
    """Both are [vocab_size] of bool."""

    special: NDArray[np.bool_]
    begins_word: NDArray[np.bool_]


def word_begins(pieces: Iterable[str], style: str) -> NDArray[np.bool_]:
    """Whether each piece begins a word, in one of the styles sentencepiece, byte_level and wordpiece.

    White space begins a word and belongs to it, new lines too. `<0x0A>` stands for a byte.
    """
    if style == "wordpiece":
        return np.array([not piece.startswith(CONTINUATION) for piece in pieces], bool)
    marks = SPACE_MARKS[style]
    return np.array([_first(piece) in marks or _first(piece).isspace() for piece in pieces], bool)


def _first(piece: str) -> str:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return chr(int(piece[3:5], 16)) if piece[3:5] < "80" else "x"
    return piece[:1] or "x"


@lru_cache(maxsize=2)
def load_pieces(tokenizer: Path) -> PieceTable:
    """The table of a tokenizer. Raises ConfigError where it is missing, DataError where it is damaged."""
    from llmtrain.data.tokenizer import load_tokenizer  # its libraries are slow to import

    loaded = load_tokenizer(tokenizer)
    return PieceTable(loaded.special, word_begins(loaded.pieces, loaded.piece_style))
