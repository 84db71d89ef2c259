"""Texts as models read them: an encoder's between tokens that stand before and behind each, a decoder's as they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llmtrain.errors import ConfigError
from llmtrain.values.tokenizer import Tokenizer

Family = Literal["encoder", "decoder"]
Offsets = list[tuple[int, int]]


@dataclass(frozen=True)
class Encoded:
    """A text's ids, and the characters [begin, end) that each is of."""

    ids: list[int]
    offsets: Offsets


@dataclass(frozen=True)
class Frame:
    """What stands around texts: `[CLS] a [SEP] b [SEP]` for an encoder (Devlin et al. 2019), `a` or `a`, a line break
    and `b` for a decoder, behind what its tokenizer puts before every text.

    `max_tokens` is the longest that a framed text may be, None for any length.
    """

    tokenizer: Tokenizer
    family: Family
    max_tokens: int | None = None

    @property
    def begin(self) -> tuple[int, ...]:
        """The ids that every framed text begins with."""
        if self.family == "decoder":
            return self.tokenizer.bos_ids
        assert self.tokenizer.cls_id is not None, "require_frame"
        return (self.tokenizer.cls_id,)

    @property
    def separator(self) -> int | None:
        """The id behind each text; None where there is none."""
        return self.tokenizer.sep_id if self.family == "encoder" else None

    def require(self) -> None:
        """Raise ConfigError where the tokenizer lacks a token of the frame."""
        if self.family == "decoder":
            return
        missing = [name for name in ("cls", "sep") if getattr(self.tokenizer, f"{name}_id") is None]
        if missing:
            raise ConfigError(
                f"{self.tokenizer.path}: has no {' and no '.join(missing)} token, which frame the texts of an encoder. "
                "Take a tokenizer of `llmtrain data tokenizer` or of a BERT, or give --family decoder."
            )

    def encode(self, text: str) -> Encoded:
        return Encoded(*self.tokenizer.encode_with_offsets(text))

    def room(self, num_texts: int) -> int | None:
        """How many ids of texts fit between the tokens of the frame; None for any number."""
        if self.max_tokens is None:
            return None
        return self.max_tokens - len(self.begin) - (num_texts if self.separator is not None else 0)

    def framed(self, texts: Sequence[list[int]]) -> tuple[NDArray[np.int64], list[int]]:
        """(the ids of one text or two with all around them, where each text begins among these)."""
        ids, begins = list(self.begin), list[int]()
        for text in texts:
            begins.append(len(ids))
            ids += text
            if self.separator is not None:
                ids.append(self.separator)
        return np.array(ids, np.int64), begins


def shortened(texts: Sequence[list[int]], room: int) -> list[list[int]]:
    """Texts that lose their ends until they fit: the longest first, of equal ones the last (as transformers does)."""
    sizes = [len(text) for text in texts]
    for _ in range(max(0, sum(sizes) - room)):
        longest = max(range(len(sizes)), key=lambda number: (sizes[number], number))
        sizes[longest] -= 1
    return [text[:size] for text, size in zip(texts, sizes, strict=True)]


def first_pieces(words: Sequence[str], encoded: Encoded) -> list[int | None]:
    """The first piece of each word of the text that the words make with a space between each two; None for a word that
    has no piece of its own."""
    found: list[int | None] = []
    begin, piece, taken = 0, 0, -1
    for word in words:
        # Pieces may begin with the space before their word.
        while piece < len(encoded.offsets) and encoded.offsets[piece][1] <= begin:
            piece += 1
        is_own = piece < len(encoded.offsets) and encoded.offsets[piece][0] < begin + len(word) and piece > taken
        found.append(piece if is_own else None)
        taken = piece if is_own else taken
        begin += len(word) + 1
    return found


def pieces_between(encoded: Encoded, begin: int, end: int) -> tuple[int, int]:
    """The pieces [first, last + 1) that have any of the characters [begin, end)."""
    touched = [n for n, (first, last) in enumerate(encoded.offsets) if first < end and last > begin]
    return (touched[0], touched[-1] + 1) if touched else (0, 0)
