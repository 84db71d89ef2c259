"""The endless stream of samples of a mixture: sample g is a pure function of g, so its only state is that number."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmtrain.config.data import DataConfig, SourceConfig, WindowKind
from llmtrain.data.mixture import Mixture, Phase
from llmtrain.data.packing_table import Packing
from llmtrain.data.read_ahead import ReadAhead
from llmtrain.data.source_reader import DocumentPart, Source, SourceReader, StreamConfig
from llmtrain.data.storage.folders import open_folder
from llmtrain.data.storage.manifest import Manifest
from llmtrain.data.storage.remote import FetchConfig
from llmtrain.data.storage.shard_file import ShardFile
from llmtrain.data.storage.skipped import SkippedShards
from llmtrain.data.storage.targets import LabelsRecord
from llmtrain.errors import DataError
from llmtrain.words import counted


@dataclass  # not frozen: one is made for every sample, and freezing it takes as long as finding its place
class Sample:
    """One window of tokens and where it came from.

    `tokens` has seq_len + 1 ids; `document_starts` are the positions in it where a document begins. The rest names
    the sample in reports: its global number, source, epoch of that source, shard and window. The last `padding` tokens
    only fill it up. A blank one stands for a sample of a skipped shard, or one behind the end of a source that is read
    once: its tokens mean nothing, and it has no targets. `targets` are read for objectives that need them: spans [n, 2]
    of positions in `tokens` that are targets, which may reach behind its end, or the labels [n] of its one document.
    """

    number: int
    tokens: NDArray[np.int64]
    document_starts: NDArray[np.int64]
    source: int
    epoch: int
    shard: int
    window: int
    blank: bool = False
    padding: int = 0
    targets: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class SampleOrigin:
    """The origin of a sample, for reports: its global number, data set, shard file and window of that shard."""

    number: int
    source: str
    shard: str
    window: int


class SampleStream:
    """All samples of a mixture, addressed by their global number. Nothing in it depends on what was read before."""

    def __init__(self, sources: Sequence[Source], config: StreamConfig, skipped: SkippedShards | None = None) -> None:
        """Samples of damaged shards are blank, and `skipped` records it; without `skipped`, damage is an error.

        Raises DataError where a source has no whole sample, or has lost too many.
        """
        self.seq_len = config.seq_len
        self._once = config.once
        self._skipped = skipped
        phases = [Phase(0, tuple(source.weight for source in sources)), *config.phases]
        self._mixture = Mixture(phases, [source.max_samples for source in sources])
        # One thread for all sources: they share a disk or a network, and one must not starve the others.
        ahead: ReadAhead[ShardFile] = ReadAhead()
        self._readers = [SourceReader(source, index, config, skipped, ahead) for index, source in enumerate(sources)]

    @property
    def eos_id(self) -> int:
        return self._readers[0].source.manifest.eos_id

    @property
    def tokenizer_sha256(self) -> str:
        """The hash of the tokenizer that the sources were written with."""
        return self._readers[0].source.manifest.tokenizer_sha256

    @property
    def bos_ids(self) -> tuple[int, ...]:
        """The ids that every document begins with."""
        return self._readers[0].source.manifest.bos_ids

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end a turn of a conversation; none in data that has no turns."""
        chat = self._readers[0].source.manifest.chat
        return chat.end_ids if chat else ()

    @property
    def labels(self) -> LabelsRecord | None:
        """The meaning of labels; None in data that has none."""
        return self._readers[0].source.manifest.labels

    def sample(self, number: int) -> Sample:
        """Sample `number`, from 0 without end. Raises DataError where its shard is damaged."""
        source, number_in_source = self._mixture.source_of(number)
        reader = self._readers[source]
        if self._once and number_in_source >= reader.order.whole_windows:
            window = reader.blank_window(number_in_source)
        else:
            window = reader.window(number_in_source)
        place = window.place
        origin = (source, place.epoch, place.shard, place.window)
        rest = (window.blank, window.padding, window.targets)
        return Sample(number, window.tokens, window.document_starts, *origin, *rest)

    @cached_property
    def length_once(self) -> int:
        """How many samples from the first on have all that each source holds, read once."""
        last = (self._mixture.number_of(i, reader.order.whole_windows - 1) for i, reader in enumerate(self._readers))
        return 1 + max(last)

    def origin(self, number: int) -> SampleOrigin:
        """The origin of sample `number`, found without opening its shard."""
        source, number_in_source = self._mixture.source_of(number)
        reader = self._readers[source]
        place = reader.order.place(number_in_source)
        shard = reader.source.manifest.shards[place.shard].file
        return SampleOrigin(number, str(reader.source.folder), shard, place.window)

    def only_read(self) -> "SampleStream":
        """The same stream, to which damage is an error unless the run has skipped that shard: nothing is recorded."""
        if self._skipped:
            self._skipped.is_closed = True
        return self

    def documents(self, number: int) -> list[DocumentPart]:
        """What sample `number` is put together of, in its order; none for a blank one. Raises as `sample` does."""
        source, number_in_source = self._mixture.source_of(number)
        reader = self._readers[source]
        return reader.documents(number_in_source)

    def counts(self, number: int) -> list[int]:
        """How many samples of each source lie before sample `number`."""
        return self._mixture.counts(number)

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
    inside of samples. With packing, `padding_share` of the samples' positions is padding, and `cut_documents` are too
    long for one. Those that are too long and in no sample are `dropped_documents`.
    """

    tokens: int
    samples: float
    unused_tokens: int
    padding_share: float = 0.0
    cut_documents: int = 0
    is_packed: bool = False
    dropped_documents: int = 0

    @property
    def unused_text(self) -> str:
        """`no token is left out`, or how many are; with packing, what it costs."""
        if self.is_packed:
            dropped = f", {counted(self.dropped_documents, 'document')} dropped" if self.dropped_documents else ""
            return f"{self.padding_share:.2%} padding, {counted(self.cut_documents, 'document')} cut{dropped}"
        if not self.unused_tokens:
            return "no token is left out"
        share = self.unused_tokens / self.tokens
        return f"{self.unused_tokens:,} of {self.tokens:,} tokens ({share:.1%}) are in no sample"


def data_use(manifest: Manifest, seq_len: int, windows: WindowKind, packing: Packing | None = None) -> DataUse:
    """The use that samples of `seq_len` tokens make of a data set."""
    tokens = manifest.stream_tokens
    if packing:
        documents = (packing.cut_documents, True, packing.dropped_documents)
        return DataUse(tokens, packing.samples, 0, packing.padding_share, *documents)
    if windows == "continuous":
        return DataUse(tokens, tokens / seq_len, 0) if tokens > seq_len else DataUse(tokens, 0, tokens)
    counts = [shard.num_windows(seq_len) for shard in manifest.shards]
    used = sum(count * seq_len + 1 for count in counts if count)
    return DataUse(tokens, sum(counts), tokens - used)


def samples_of_epochs(
    manifest: Manifest, seq_len: int, windows: WindowKind, packing: Packing | None = None, epochs: int = 1
) -> int:
    """How many whole samples a data set holds that is read so often; once, as an evaluation does."""
    if packing:
        return epochs * packing.samples
    if windows == "continuous":
        return max(0, epochs * manifest.stream_tokens - 1) // seq_len
    return epochs * manifest.num_windows(seq_len)


def sample_limit(source: SourceConfig, data: DataConfig, manifest: Manifest, packing: Packing | None) -> int | None:
    """How many samples a run may take of a source; None where nothing ends it."""
    limits = [source.max_samples]
    if source.max_tokens is not None:
        limits.append(source.max_tokens // data.seq_len)
    if source.max_epochs is not None:
        windows = data.windows or "continuous"
        limits.append(samples_of_epochs(manifest, data.seq_len, windows, packing, source.max_epochs))
    return min((limit for limit in limits if limit is not None), default=None)
