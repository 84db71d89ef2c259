"""From documents to a data set: tokens in tar shards, split into train and valid, with index and manifest."""

import hashlib
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from data_pipelines.cutting import tokenized
from data_pipelines.dataset_writer import (
    DatasetWriter,
    ShardingConfig,
    TargetsWriting,
    bos_ids_of,
    settings_of,
    work_folder,
)
from llmtrain.data.storage.manifest import (
    MANIFEST_NAME,
    Manifest,
    file_sha256,
)
from llmtrain.data.token_roles import SETTINGS_NAME
from llmtrain.errors import ConfigError
from llmtrain.files import replace_folder
from llmtrain.values.tokenizer import Tokenizer

SPLITS = ("train", "valid")

_PLACES = 2.0**64

Item = TypeVar("Item")

_HELD_CHARACTERS = 50_000_000
"""Characters of the documents that are looked at before the first is handed on."""


@dataclass(frozen=True, slots=True)
class TargetDocument:
    """A document whose ids are there already, with its spans or labels. Its split follows from `text`; `counts` are
    added up for the manifest of its split."""

    text: str
    ids: NDArray[Any]
    targets: NDArray[np.int64]
    counts: Mapping[str, int] = field(default_factory=dict)


def write_shards(
    documents: Iterable[str | TargetDocument],
    out: Path,
    tokenizer: Tokenizer,
    config: ShardingConfig,
    targets: TargetsWriting | None = None,
) -> dict[str, Manifest]:
    """Tokenize documents into OUT/train and OUT/valid and return their manifests; with `targets`, documents bring their
    ids and a second member.

    The files depend only on documents, tokenizer and sizes, not on the number of workers. OUT appears whole or not
    at all; with a valid_fraction of 0 there is no OUT/valid. Raises ConfigError where OUT is in use, and where a split
    would be empty.
    """
    bos_ids = bos_ids_of(tokenizer, config.bos) if targets is None else targets.bos_ids
    with _published(out, tokenizer, config, bos_ids) as folder, ExitStack() as opened:
        writers = {
            name: opened.enter_context(DatasetWriter(folder / name, tokenizer, config, targets))
            for name in splits_of(config.valid_fraction)
        }
        split = split_documents(documents, config.valid_fraction, _text_of)
        if targets is None:
            texts = ((name, _text_of(found)) for name, found in split)
            for name, ids in tokenized(texts, tokenizer, config.num_workers):
                writers[name].add(ids)
        else:
            for name, found in split:
                assert isinstance(found, TargetDocument)
                writers[name].add(found.ids, found.targets, found.counts)
        require_all({name: writer.num_documents for name, writer in writers.items()}, config.valid_fraction)
        return {name: writer.finish() for name, writer in writers.items()}


def _text_of(document: str | TargetDocument) -> str:
    return document if isinstance(document, str) else document.text


@contextmanager
def _published(out: Path, tokenizer: Tokenizer, config: ShardingConfig, bos_ids: tuple[int, ...]) -> Iterator[Path]:
    """A folder for the splits, which is put in place of `out` with the tokenizer beside them."""
    if not 0 <= config.valid_fraction < 1:
        raise ConfigError(
            f"--valid-fraction {config.valid_fraction}: must be at least 0 and below 1, such as 0.1; with 0 there is "
            "no valid split"
        )
    # Files in OUT that are this tokenizer stay: it may have been trained there.
    files = [path for path in out.iterdir() if path.is_file()] if out.is_dir() else []
    kept = {path.name for path in files if file_sha256(path) == tokenizer.sha256}
    _check_output(out, config.overwrite, kept)
    with work_folder(out) as temporary:
        yield temporary
        for name in {f"tokenizer{tokenizer.path.suffix}", *kept}:
            shutil.copyfile(tokenizer.path, temporary / name)
        if (settings := settings_of(tokenizer, bos_ids)) is not None:
            (temporary / SETTINGS_NAME).write_text(settings, "utf-8")
        _publish(temporary, out)


def _check_output(out: Path, overwrite: bool, kept: set[str]) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is a file; the shards need a folder. Name another one.")
    allowed = {*kept, SETTINGS_NAME} if kept else set()  # what is said of the tokenizer is written again
    if not out.exists() or all(path.name in allowed for path in out.iterdir()):
        return
    if not overwrite:
        raise ConfigError(f"{out}: is not empty. Name another folder, or replace what it holds with --overwrite.")
    # What is replaced is deleted: never anything but shards.
    if not (out / SPLITS[0] / MANIFEST_NAME).is_file():
        raise ConfigError(f"{out}: holds no shards written before, so it is not overwritten. Name another folder.")


def _publish(temporary: Path, out: Path) -> None:
    """Put the finished folder in place of `out`."""
    old = temporary.with_name(f"{temporary.name}.old")
    replace_folder(temporary, out, old)
    if old.exists():
        shutil.rmtree(old)


def splits_of(valid_fraction: float) -> tuple[str, ...]:
    """The splits that there are to be."""
    return SPLITS if valid_fraction else SPLITS[:1]


def split_documents(
    documents: Iterable[Item], valid_fraction: float, text_of: Callable[[Any], str] = str
) -> Iterator[tuple[str, Item]]:
    """The split of each document, and the document.

    The first ones are looked at before any work is put into them. Where they are all that there are, and one split
    would be empty, the bound between the splits moves to the nearest that gives both a document. Raises ConfigError
    where that cannot be.
    """
    bound = valid_fraction * _PLACES
    held: deque[tuple[int, Item]] = deque()
    found: set[str] = set()
    characters = 0
    rest = ((place_of(text_of(document)), document) for document in documents)
    for place, document in rest:
        held.append((place, document))
        found.add(_split(place, bound))
        characters += len(text_of(document))
        if len(found) == len(splits_of(valid_fraction)) or (characters > _HELD_CHARACTERS and len(held) > 1):
            break
    else:
        if valid_fraction and held:
            places = [place for place, _ in held]
            bound = bound_between(min(places), max(places), bound)
        counts = Counter(_split(place, bound) for place, _ in held)
        require_all({split: counts[split] for split in splits_of(valid_fraction)}, valid_fraction)
    while held:
        place, document = held.popleft()
        yield _split(place, bound), document
    for place, document in rest:
        yield _split(place, bound), document


def place_of(text: str) -> int:
    """A document's place below 2^64, which follows from its text: a copy of it never lands in another split."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, person=b"split").digest(), "little")


def bound_between(lowest: int, highest: int, bound: float) -> float:
    """The bound between the splits, moved as little as gives both a document, from the places of all documents."""
    return min(max(bound, lowest + 1), highest)


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
