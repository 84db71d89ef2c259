"""MinHash signatures of documents (Broder 1997) and their bands, of which two near duplicates share one (LSH).

A signature has NUM_HASHES minima over the hashes of a document's word n-grams: the share of equal minima of two
signatures is an estimate of the Jaccard similarity of the sets, with a standard deviation of sqrt(J (1 - J) / 128).
Signatures are kept with 16 bits for each minimum, which makes unequal ones equal once in 65,536.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.documents import Document
from data_pipelines.pipeline.work import Output
from llmtrain.config.pipelines.steps import NearDedupStep

NUM_HASHES = 128
SIGNATURES, BANDS = ".signatures", ".bands"
"""Endings: minima [n, NUM_HASHES], uint16, and hashes of bands [bands, n], uint64."""

LEAST_FOUND = 0.94
"""Share of the pairs at the threshold itself that become candidates at least."""

_BATCH = 256
_MULTIPLIERS = np.random.Generator(np.random.PCG64(20)).integers(0, 2**63, NUM_HASHES, np.uint64) * np.uint64(
    2
) + np.uint64(1)
"""Odd numbers that mix the minima of a band."""


def rows_of_band(threshold: float) -> int:
    """The minima of a band: as many as still make candidates of LEAST_FOUND of the pairs at the threshold, since more
    make fewer candidates of others. A pair of similarity s shares a band with the probability 1 - (1 - s^rows)^bands.
    """
    fitting = [
        rows
        for rows in range(1, NUM_HASHES + 1)
        if NUM_HASHES % rows == 0 and 1 - (1 - threshold**rows) ** (NUM_HASHES // rows) >= LEAST_FOUND
    ]
    return max(fitting, default=1)


def num_bands(threshold: float) -> int:
    """How many bands a signature has."""
    return NUM_HASHES // rows_of_band(threshold)


def band_hashes(minima: NDArray[np.uint32], threshold: float) -> NDArray[np.uint64]:
    """Hashes [bands, n] of the bands of signatures [n, NUM_HASHES]."""
    rows = rows_of_band(threshold)
    mixed = minima.astype(np.uint64) * _MULTIPLIERS
    mixed ^= mixed >> np.uint64(29)
    hashes = mixed.reshape(len(minima), NUM_HASHES // rows, rows).sum(2, dtype=np.uint64) * np.uint64(
        0x9E3779B97F4A7C15
    )
    return np.ascontiguousarray((hashes ^ (hashes >> np.uint64(32))).T)


def ngrams(text: str, size: int) -> list[str]:
    """The word n-grams of a text, without case; of a shorter one all its words together."""
    words = text.lower().split()
    if len(words) <= size:
        return [" ".join(words)]
    return [" ".join(words[begin : begin + size]) for begin in range(len(words) - size + 1)]


class Signatures:
    """Collects the signatures of a chunk's documents."""

    def __init__(self, config: NearDedupStep, seed: int) -> None:
        self._config, self._seed = config, seed
        self._waiting: list[list[str]] = []
        self._minima: list[NDArray[np.uint32]] = []

    def add(self, document: Document) -> None:
        self._waiting.append(ngrams(document.text, self._config.ngram))
        if len(self._waiting) == _BATCH:
            self._digest()

    def _digest(self) -> None:
        import rensa

        # Its classes are compiled, and a checker does not see them.
        minhash: Any = rensa
        digests = minhash.RMinHash.digests_from_token_sets(self._waiting, NUM_HASHES, self._seed)
        self._minima.append(np.array(digests, np.uint32).reshape(-1, NUM_HASHES))
        self._waiting = []

    def write(self, output: Output) -> None:
        self._digest()
        minima = np.concatenate(self._minima)
        with output.file(SIGNATURES) as file:
            file.write(minima.astype(np.uint16).tobytes())
        with output.file(BANDS) as file:
            file.write(band_hashes(minima, self._config.threshold).tobytes())
