"""Which documents are for training and which for validation."""

import hashlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping

from llmtrain.errors import ConfigError

SPLITS = ("train", "valid")

_PLACES = 2.0**64

_HELD_CHARACTERS = 50_000_000
"""Of the documents that are looked at before the first is handed on."""


def in_valid(text: str, valid_fraction: float) -> bool:
    """Whether a document belongs to the valid split: by its content, so that a copy of it never lands in the other."""
    return _place(text) < valid_fraction * _PLACES


def splits_of(valid_fraction: float) -> tuple[str, ...]:
    """The splits that there are to be."""
    return SPLITS if valid_fraction else SPLITS[:1]


def split_documents(documents: Iterable[str], valid_fraction: float) -> Iterator[tuple[str, str]]:
    """The split and text of each document.

    The first ones are looked at before any work is put into them. Where they are all that there are, and one split
    would be empty, the bound between the splits moves to the nearest that gives both a document. Raises ConfigError
    where that cannot be.
    """
    bound = valid_fraction * _PLACES
    held: deque[tuple[int, str]] = deque()
    found: set[str] = set()
    characters = 0
    rest = ((_place(text), text) for text in documents)
    for place, text in rest:
        held.append((place, text))
        found.add(_split(place, bound))
        characters += len(text)
        if len(found) == len(splits_of(valid_fraction)) or (characters > _HELD_CHARACTERS and len(held) > 1):
            break
    else:
        if valid_fraction and held:
            places = [place for place, _ in held]
            bound = min(max(bound, min(places) + 1), max(places))
        counts = Counter(_split(place, bound) for place, _ in held)
        require_all({split: counts[split] for split in splits_of(valid_fraction)}, valid_fraction)
    while held:
        place, text = held.popleft()
        yield _split(place, bound), text
    for place, text in rest:
        yield _split(place, bound), text


def _place(text: str) -> int:
    """Where the content of a document stands between 0 and 2^64."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, person=b"split").digest(), "little")


def _split(place: int, bound: float) -> str:
    return "valid" if place < bound else "train"


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
