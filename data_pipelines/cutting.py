"""Cutting long texts where the tokenizer would cut them itself, so that their ids are made piece by piece.

A library that tokenizes keeps a hundred bytes and more for every byte of text. A cut gives the same ids as the whole
text where no token of the vocabulary can reach over it, and where the tokenizer treats the end of one piece and the
begin of the next as the middle of a text: the first is seen from the vocabulary, the second is tried at the cut.
Tokenizers of which it does not hold, such as those that put a space before every text, get their texts whole.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from llmtrain.data.storage.manifest import DTYPES, dtype_name
from llmtrain.data.tokenizer import SPACE_MARK
from llmtrain.values.tokenizer import Tokenizer

Tag = TypeVar("Tag")

LONGEST_PIECE = 1 << 16
"""Characters. Longer texts are cut, into pieces of half that length at least."""

_BATCH_CHARACTERS = 4 * LONGEST_PIECE
"""For each thread: what a library needs to tokenize them takes a hundred times as many bytes."""

_TRIED = 8
_AROUND = 512
"""Characters on each side of a cut that are tokenized together and apart."""

_BLANKS = (" ", "\n")
"""Texts are cut before them, where something else stands before."""


class Cutter:
    """Cuts texts for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        joined: set[str] = set()
        for piece, special in zip(_texts_of_pieces(tokenizer), tokenizer.special, strict=True):
            if not special:
                joined.update(second for first, second in pairwise(piece) if not first.isspace())
        self._blanks = [blank for blank in _BLANKS if blank not in joined]

    def pieces(self, text: str) -> Iterator[str]:
        """Parts of a text, whose ids, one after another, are those of the text."""
        begin = 0
        while len(text) - begin > LONGEST_PIECE and (cut := self._cut(text, begin)):
            yield text[begin:cut]
            begin = cut
        yield text[begin:]

    def _cut(self, text: str, begin: int) -> int | None:
        """A place before a blank that follows something else; None where there is none."""
        length = LONGEST_PIECE
        while begin + length // 2 < len(text):
            for blank in self._blanks:
                end = begin + length
                for _ in range(_TRIED):
                    end = text.rfind(blank, begin + length // 2, end)
                    if end < 0:
                        break
                    if text[end - 1].isspace():
                        continue
                    before, after = text[max(0, end - _AROUND) : end], text[end : end + _AROUND]
                    left, right, both = self._tokenizer.encode_batch([before, after, before + after])
                    if [*left.tolist(), *right.tolist()] == both.tolist():
                        return end
            length *= 2
        return None


@lru_cache(maxsize=4)
def _cutter_of(tokenizer: Tokenizer) -> Cutter:
    """Made once: it looks at every piece of the vocabulary."""
    return Cutter(tokenizer)


def _texts_of_pieces(tokenizer: Tokenizer) -> Iterator[str]:
    """The text of each token; bytes that do not make a character alone become one that no text has."""
    if tokenizer.piece_style != "byte_level":
        yield from (piece.replace(SPACE_MARK, " ") for piece in tokenizer.pieces)
        return
    # Bytes are written as the characters of their number, those that cannot be seen as others from 256 on.
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    byte_of = {chr(byte): byte for byte in visible} | {chr(256 + number): byte for number, byte in enumerate(hidden)}
    for piece in tokenizer.pieces:
        content = bytes(byte_of[character] for character in piece if character in byte_of)
        yield content.decode("utf-8", errors="replace")


@dataclass(frozen=True)
class _Piece(Generic[Tag]):
    """A part of a document, which `tag` says something of; the last one ends it."""

    tag: Tag
    text: str
    last: bool


def tokenized(
    documents: Iterable[tuple[Tag, str]], tokenizer: Tokenizer, num_workers: int = 1
) -> Iterator[tuple[Tag, NDArray[Any]]]:
    """The tag and the ids of each (tag, text), in the type that shards have; the same for every number of threads.

    Of a long text only itself and its ids are ever held.
    """
    dtype = DTYPES[dtype_name(tokenizer.vocab_size)]
    parts: list[NDArray[Any]] = []
    for batch in _batches(_iter_pieces(documents, _cutter_of(tokenizer)), _BATCH_CHARACTERS * num_workers):
        encoded = tokenizer.encode_batch([piece.text for piece in batch], num_workers)
        for piece, ids in zip(batch, encoded, strict=True):
            parts.append(ids.astype(dtype))
            if piece.last:
                yield piece.tag, np.concatenate(parts)
                parts = []


def _iter_pieces(documents: Iterable[tuple[Tag, str]], cutter: Cutter) -> Iterator[_Piece[Tag]]:
    for tag, text in documents:
        parts = cutter.pieces(text)
        part = next(parts)
        for following in parts:
            yield _Piece(tag, part, False)
            part = following
        yield _Piece(tag, part, True)


def _batches(pieces: Iterable[_Piece[Tag]], most_characters: int) -> Iterator[list[_Piece[Tag]]]:
    """Pieces in lists large enough to share among threads."""
    batch: list[_Piece[Tag]] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= most_characters:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
