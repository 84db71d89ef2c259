"""The endless stream of samples of a mixture: sample g is a pure function of g, so its only state is that number."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmtrain.data.order import SampleOrder
from llmtrain.data.shards import Manifest, ShardFile, Verify, read_manifest
from llmtrain.errors import DataError

LONGEST_PERIOD = 1_000_000
"""Largest sum of mixture weights: the schedule of one period is held in memory."""


@dataclass(frozen=True)
class Sample:
    """One window of tokens and where it came from.

    `tokens` has seq_len + 1 ids; `document_starts` are the positions in it where a document begins. The rest names
    the sample in reports: its global number, source, epoch of that source, shard and window.
    """

    number: int
    tokens: NDArray[np.int64]
    document_starts: NDArray[np.int64]
    source: int
    epoch: int
    shard: int
    window: int


@dataclass(frozen=True)
class Source:
    """A data set of the mixture, with its manifest already read."""

    path: Path
    manifest: Manifest
    weight: int = 1


@dataclass(frozen=True)
class StreamConfig:
    """What the stream is made with, beside its sources."""

    seed: int
    seq_len: int
    shuffle_shards: int = 8
    verify: Verify = "first"


class MixtureSchedule:
    """A fixed periodic schedule: in every period of sum(weights) samples, source i has weights[i] of them.

    The j-th sample of source i stands at time (j + 1/2) / weights[i] of the period, so that sources are spread evenly.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        divisor = gcd(*weights)
        self._weights = [weight // divisor for weight in weights]
        if sum(self._weights) > LONGEST_PERIOD:
            raise DataError(
                f"the weights {', '.join(map(str, weights))} of the sources: their sum must be at most "
                f"{LONGEST_PERIOD:,} after division by their common divisor. Give shares such as 70 and 30."
            )
        # Correctly rounded divisions: equal fractions are equal floats, and ties go to the earlier source.
        times = np.concatenate([(np.arange(weight) + 0.5) / weight for weight in self._weights])
        sources = np.repeat(np.arange(len(self._weights)), self._weights)
        turns = np.concatenate([np.arange(weight) for weight in self._weights])
        order = np.argsort(times, kind="stable")
        self._sources, self._turns = sources[order].tolist(), turns[order].tolist()

    def source_of(self, number: int) -> tuple[int, int]:
        """The source of global sample `number`, and the sample's number within that source."""
        period, position = divmod(number, len(self._sources))
        source = self._sources[position]
        return source, period * self._weights[source] + self._turns[position]


class SampleStream:
    """All samples of a mixture, addressed by their global number. Nothing in it depends on what was read before."""

    def __init__(self, sources: Sequence[Source], config: StreamConfig) -> None:
        """Raises DataError where a source has no whole sample."""
        self.seq_len = config.seq_len
        self._schedule = MixtureSchedule([source.weight for source in sources])
        self._readers = [_SourceReader(source, index, config) for index, source in enumerate(sources)]

    @property
    def eos_id(self) -> int:
        return self._readers[0].source.manifest.eos_id

    def sample(self, number: int) -> Sample:
        """Sample `number`, from 0 without end. Raises DataError where its shard is damaged."""
        source, number_in_source = self._schedule.source_of(number)
        reader = self._readers[source]
        place = reader.order.place(number_in_source)
        tokens, document_starts = reader.shard(place.shard).window(place.window, self.seq_len)
        return Sample(number, tokens, document_starts, source, place.epoch, place.shard, place.window)

    def shard_path(self, sample: Sample) -> Path:
        """The file that a sample came from."""
        source = self._readers[sample.source].source
        return source.path / source.manifest.shards[sample.shard].file


class _SourceReader:
    """One source's order and the shards of it that are open."""

    def __init__(self, source: Source, index: int, config: StreamConfig) -> None:
        self.source = source
        windows = [shard.num_windows(config.seq_len) for shard in source.manifest.shards]
        if not sum(windows):
            longest = max((shard.tokens + shard.samples for shard in source.manifest.shards), default=0)
            raise DataError(
                f"{source.path}: no shard holds a whole sample of {config.seq_len} + 1 tokens; its largest has "
                f"{longest} with ends of sequence. Lower data.seq_len, or write shards from more text."
            )
        self.order = SampleOrder(windows, config.seed, index, config.shuffle_shards)
        self._verify = config.verify
        self._hashed: set[int] = set()
        self._open: OrderedDict[int, ShardFile] = OrderedDict()
        self._most_open = 2 * config.shuffle_shards  # the current group, and the one that follows it

    def shard(self, number: int) -> ShardFile:
        """The opened shard; the least recently used one is closed where too many are open."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        hashed = self._verify == "always" or (self._verify == "first" and number not in self._hashed)
        shard = ShardFile(self.source.path, self.source.manifest, number, hashed)
        if hashed:
            self._hashed.add(number)
        self._open[number] = shard
        if len(self._open) > self._most_open:
            self._open.popitem(last=False)
        return shard


def load_sources(paths: Sequence[str | Path], weights: Sequence[int]) -> list[Source]:
    """Read the manifests of a mixture. Raises DataError where they do not belong to one tokenizer."""
    sources = [Source(Path(path), read_manifest(path), weight) for path, weight in zip(paths, weights, strict=True)]
    first = sources[0]
    for other in sources[1:]:
        for key in ("tokenizer_sha256", "vocab_size", "eos_id"):
            expected, actual = getattr(first.manifest, key), getattr(other.manifest, key)
            if expected != actual:
                raise DataError(
                    f"{other.path}: {key} is {actual}, but {expected} in {first.path}. The sources of a mixture must "
                    "be written with one tokenizer: write the shards of one of them again."
                )
    return sources
