"""What is kept of each document of a chunk beside its text, for stages that look at all documents at once."""

import hashlib
from typing import Any, Protocol

import numpy as np

from data_pipelines.documents import Document
from data_pipelines.duplicates.signatures import Signatures
from data_pipelines.pipeline.work import Output, Workspace

KEYS, SIZES = ".keys", ".sizes"
"""Endings: keys of texts [n, 2] and (drawn key, bytes) [n, 2] of each document, uint64."""


class Sidecar(Protocol):
    """Collects from the documents of a chunk in their order."""

    def add(self, document: Document) -> None: ...

    def write(self, output: Output) -> None:
        """Write its files."""
        ...


def sidecars_of(work: Workspace, segment_number: int) -> list[Sidecar]:
    """Those that the stages behind a segment need."""
    segment = work.program.segments[segment_number]
    sidecars: list[Sidecar] = []
    if segment.exact:
        sidecars.append(_Keys())
    if segment.near is not None:
        sidecars.append(Signatures(segment.near, work.config.seed))
    if work.program.has_caps and segment_number == len(work.program.segments) - 1:
        sidecars.append(_Sizes(work.config.seed))
    return sidecars


class _Keys:
    """Hashes of 16 bytes: among a hundred billion documents the chance of two alike is one in ten thousand million
    million."""

    def __init__(self) -> None:
        self._keys = bytearray()

    def add(self, document: Document) -> None:
        self._keys += hashlib.blake2b(document.text.encode(), digest_size=16, person=b"exact").digest()

    def write(self, output: Output) -> None:
        with output.file(KEYS) as file:
            file.write(self._keys)


class _Sizes:
    """A drawn key, by which documents of a source stay until it has its size, and the bytes."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._rows: list[tuple[int, int]] = []

    def add(self, document: Document) -> None:
        self._rows.append((drawn_key(self._seed, document.id, b"caps"), len(document.text.encode())))

    def write(self, output: Output) -> None:
        with output.file(SIZES) as file:
            file.write(np.array(self._rows, np.uint64).reshape(-1, 2).tobytes())


def drawn_key(seed: int, name: Any, purpose: bytes) -> int:
    """A number below 2^64 that depends on seed, name and purpose only."""
    key = seed.to_bytes(8, "little")
    return int.from_bytes(
        hashlib.blake2b(str(name).encode(), digest_size=8, key=key, person=purpose).digest(), "little"
    )
