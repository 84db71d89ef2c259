"""Which documents are for training and which for validation."""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping

from llmtrain.errors import ConfigError

SPLITS = ("train", "valid")

_HELD_CHARACTERS = 50_000_000
"""Of the documents that are looked at before the first is handed on."""


def in_valid(text: str, valid_fraction: float) -> bool:
    """Whether a document belongs to the valid split: by its content, so that a copy of it never lands in the other."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"split").digest()
    return int.from_bytes(digest, "little") < valid_fraction * 2.0**64


def splits_of(valid_fraction: float) -> tuple[str, ...]:
    """The splits that there are to be."""
    return SPLITS if valid_fraction else SPLITS[:1]


def split_documents(documents: Iterable[str], valid_fraction: float) -> Iterator[tuple[str, str]]:
    """The split and text of each document.

    Some are looked at first, so that a split without documents is told before any work is put into them. Raises
    ConfigError.
    """
    counts = dict.fromkeys(splits_of(valid_fraction), 0)
    held: deque[tuple[str, str]] = deque()
    characters = 0
    rest = ((_split_of(text, valid_fraction), text) for text in documents)
    for split, text in rest:
        held.append((split, text))
        counts[split] += 1
        characters += len(text)
        if all(counts.values()) or (characters > _HELD_CHARACTERS and len(held) > 1):
            break
    else:
        require_all(counts, valid_fraction)
    while held:
        yield held.popleft()
    yield from rest


def _split_of(text: str, valid_fraction: float) -> str:
    return "valid" if valid_fraction and in_valid(text, valid_fraction) else "train"


def require_all(counts: Mapping[str, int], valid_fraction: float) -> None:
    """Raise ConfigError where a split has no document."""
    if all(counts.values()):
        return
    if "valid" not in counts:
        raise ConfigError("there is no document: the inputs hold no text. Name files with text.")
    raise ConfigError(
        f"of {sum(counts.values())} documents, {counts['train']} fall into train and {counts['valid']} into valid with "
        f"--valid-fraction {valid_fraction}; both need one. Documents are never cut: give more of them (a .jsonl holds "
        "one per line, --separator finds them in a text file), another fraction, or --valid-fraction 0 for no valid."
    )
