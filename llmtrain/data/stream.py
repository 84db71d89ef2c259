"""The endless stream of samples of a mixture: sample g is a pure function of g, so its only state is that number."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmtrain.config.data import LONGEST_PERIOD, WindowKind
from llmtrain.data.source_reader import ReadAhead, Source, SourceReader, StreamConfig
from llmtrain.data.storage.folders import open_folder
from llmtrain.data.storage.manifest import Manifest
from llmtrain.data.storage.remote import FetchConfig
from llmtrain.data.storage.shard_file import ShardFile
from llmtrain.data.storage.skipped import SkippedShards
from llmtrain.errors import DataError


@dataclass(frozen=True)
class Sample:
    """One window of tokens and where it came from.

    `tokens` has seq_len + 1 ids; `document_starts` are the positions in it where a document begins. The rest names
    the sample in reports: its global number, source, epoch of that source, shard and window. A blank one stands for a
    sample of a skipped shard, or one behind the end of a source that is read once: its tokens mean nothing, and it has
    no targets.
    """

    number: int
    tokens: NDArray[np.int64]
    document_starts: NDArray[np.int64]
    source: int
    epoch: int
    shard: int
    window: int
    blank: bool = False


@dataclass(frozen=True)
class SampleOrigin:
    """The origin of a sample, for reports: its global number, data set, shard file and window of that shard."""

    number: int
    source: str
    shard: str
    window: int


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

    def number_of(self, source: int, number_in_source: int) -> int:
        """The global number of a source's sample: the inverse of `source_of`."""
        period, turn = divmod(number_in_source, self._weights[source])
        position = next(i for i, each in enumerate(self._sources) if each == source and self._turns[i] == turn)
        return period * len(self._sources) + position


class SampleStream:
    """All samples of a mixture, addressed by their global number. Nothing in it depends on what was read before."""

    def __init__(self, sources: Sequence[Source], config: StreamConfig, skipped: SkippedShards | None = None) -> None:
        """Samples of damaged shards are blank, and `skipped` records it; without `skipped`, damage is an error.

        Raises DataError where a source has no whole sample, or has lost too many.
        """
        self.seq_len = config.seq_len
        self._once = config.once
        self._schedule = MixtureSchedule([source.weight for source in sources])
        # One thread for all sources: they share a disk or a network, and one must not starve the others.
        ahead: ReadAhead[ShardFile] = ReadAhead()
        self._readers = [SourceReader(source, index, config, skipped, ahead) for index, source in enumerate(sources)]

    @property
    def eos_id(self) -> int:
        return self._readers[0].source.manifest.eos_id

    @property
    def bos_ids(self) -> tuple[int, ...]:
        """The ids that every document begins with."""
        return self._readers[0].source.manifest.bos_ids

    def sample(self, number: int) -> Sample:
        """Sample `number`, from 0 without end. Raises DataError where its shard is damaged."""
        source, number_in_source = self._schedule.source_of(number)
        reader = self._readers[source]
        if self._once and number_in_source >= reader.order.whole_windows:
            window = reader.blank_window(number_in_source)
        else:
            window = reader.window(number_in_source)
        place = window.place
        return Sample(
            number, window.tokens, window.document_starts, source, place.epoch, place.shard, place.window, window.blank
        )

    @cached_property
    def length_once(self) -> int:
        """How many samples from the first on have all that each source holds, read once."""
        last = (self._schedule.number_of(i, reader.order.whole_windows - 1) for i, reader in enumerate(self._readers))
        return 1 + max(last)

    def origin(self, number: int) -> SampleOrigin:
        """The origin of sample `number`, found without opening its shard."""
        source, number_in_source = self._schedule.source_of(number)
        reader = self._readers[source]
        place = reader.order.place(number_in_source)
        shard = reader.source.manifest.shards[place.shard].file
        return SampleOrigin(number, str(reader.source.folder), shard, place.window)

    def shard_path(self, sample: Sample) -> str:
        """The file or URL that a sample came from."""
        return self._readers[sample.source].location(sample.shard)


def load_sources(
    paths: Sequence[str | Path],
    weights: Sequence[int],
    fetch: FetchConfig | None = None,
    manifests: Sequence[Manifest] | None = None,
) -> list[Source]:
    """The data sets of a mixture; their manifests are read where they are not given.

    Raises DataError where they do not belong to one tokenizer.
    """
    folders = [open_folder(path, fetch) for path in paths]
    if manifests is None:
        manifests = [folder.read_manifest() for folder in folders]
    sources = [Source(*source) for source in zip(folders, manifests, weights, strict=True)]
    first = sources[0]
    for other in sources[1:]:
        for key in ("tokenizer_sha256", "vocab_size", "eos_id", "bos_ids"):
            expected, actual = getattr(first.manifest, key), getattr(other.manifest, key)
            if expected != actual:
                raise DataError(
                    f"{other.folder}: {key} is {actual}, but {expected} in {first.folder}. The sources of a mixture "
                    "must be written with one tokenizer: write the shards of one of them again."
                )
    return sources


@dataclass(frozen=True)
class DataUse:
    """Counts of one data set: its `tokens`, ends of sequence included, samples of one epoch, tokens in no epoch.

    `unused_tokens` lie at the ends of shards, or in data too short for one sample. Epochs of continuous windows end
    inside of samples.
    """

    tokens: int
    samples: float
    unused_tokens: int

    @property
    def unused_text(self) -> str:
        """`no token is left out`, or how many are."""
        if not self.unused_tokens:
            return "no token is left out"
        share = self.unused_tokens / self.tokens
        return f"{self.unused_tokens:,} of {self.tokens:,} tokens ({share:.1%}) are in no sample"


def data_use(manifest: Manifest, seq_len: int, windows: WindowKind) -> DataUse:
    """The use that samples of `seq_len` tokens make of a data set."""
    tokens = manifest.stream_tokens
    if windows == "continuous":
        return DataUse(tokens, tokens / seq_len, 0) if tokens > seq_len else DataUse(tokens, 0, tokens)
    counts = [shard.num_windows(seq_len) for shard in manifest.shards]
    used = sum(count * seq_len + 1 for count in counts if count)
    return DataUse(tokens, sum(counts), tokens - used)


def samples_once(manifest: Manifest, seq_len: int, windows: WindowKind) -> int:
    """How many whole samples a data set holds that is read through once, as an evaluation does."""
    if windows == "continuous":
        return max(0, manifest.stream_tokens - 1) // seq_len
    return sum(shard.num_windows(seq_len) for shard in manifest.shards)
