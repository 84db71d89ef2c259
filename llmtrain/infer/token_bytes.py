"""The bytes that each token adds to a text, whatever library is behind the tokenizer."""

import re
from functools import cache

from llmtrain.data.tokenizer import SPACE_MARK
from llmtrain.errors import ConfigError
from llmtrain.values.tokenizer import Tokenizer

BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
TRIAL = 'a b  c\n{"x": [1, -2.5e3], "\u00e4\u4e2d": null}\t\\ end'


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of each id as it stands inside a text; of special tokens and ids that are left out, none.

    Raises ConfigError for a tokenizer whose tokens do not give back a text byte by byte.
    """
    of_piece = _of_byte_level if tokenizer.piece_style == "byte_level" else _of_text
    pieces, special = tokenizer.pieces, tokenizer.special
    found = [b"" if special[token] else of_piece(tokenizer, token, piece) for token, piece in enumerate(pieces)]
    # Before the first word some tokenizers put a space, which they take away again.
    if b"".join(found[token] for token in tokenizer.encode(TRIAL)).removeprefix(b" ") != TRIAL.encode():
        raise ConfigError(
            f"{tokenizer.path}: its tokens do not spell a text byte by byte ({tokenizer.piece_style}), so nothing can "
            "be said of what they may go on with."
        )
    return found


def _of_text(tokenizer: Tokenizer, token: int, piece: str) -> bytes:
    byte = BYTE_PIECE.fullmatch(piece)
    if byte and tokenizer.decode([token]) != piece:  # not a token whose text looks so
        return bytes([int(byte[1], 16)])
    return piece.replace(SPACE_MARK, " ").encode()


def _of_byte_level(tokenizer: Tokenizer, token: int, piece: str) -> bytes:
    known = byte_of_character()
    if all(character in known for character in piece):
        return bytes(known[character] for character in piece)
    return piece.encode()  # it was added as it is


@cache
def byte_of_character() -> dict[str, int]:
    """The byte for which each character stands in byte-level pieces (Radford et al. 2019): itself where that can be
    printed in Latin-1, else one of the characters from 256 on, in order."""
    printed = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in set(printed)]
    return {chr(byte): byte for byte in printed} | {chr(256 + place): byte for place, byte in enumerate(others)}
