"""The samples of one source: their order, its open shards and those that come next, and those that are skipped."""

from collections import OrderedDict
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmtrain.config.data import WindowKind
from llmtrain.data.mixture import Phase
from llmtrain.data.order import ContinuousOrder, Place, SampleOrder
from llmtrain.data.packing import PackedShard, PackingPlan, packed_shard
from llmtrain.data.packing_table import Packing
from llmtrain.data.read_ahead import ReadAhead
from llmtrain.data.storage.folders import DataFolder
from llmtrain.data.storage.manifest import DamagedFileError, Manifest
from llmtrain.data.storage.shard_file import ShardFile
from llmtrain.data.storage.skipped import SkippedShard, SkippedShards, SourceSamples, shard_key
from llmtrain.errors import DataError

Verify = Literal["off", "first", "always"]


@dataclass(frozen=True)
class Source:
    """A data set of the mixture, with its manifest already read."""

    folder: DataFolder
    manifest: Manifest
    weight: int = 1
    max_samples: int | None = None
    """As many as a run may take of it, then the mixture goes on without it; None: there is no end."""
    packing: Packing | None = None
    """Where samples are put together of whole documents."""


@dataclass(frozen=True)
class StreamConfig:
    """The settings of a stream, beside its sources.

    With `read_ahead` a thread opens, hashes and fetches shards before they are needed.
    """

    seed: int
    seq_len: int
    shuffle_shards: int = 8
    verify: Verify = "first"
    read_ahead: bool = False
    windows: WindowKind = "continuous"
    with_targets: bool = False
    """Read the second member of each document."""
    once: bool = False
    """Read each source through once: samples behind that are blank."""
    phases: tuple[Phase, ...] = ()
    """Other weights than those of the sources, from samples on."""


class Window(NamedTuple):
    """A sample's place, tokens, and positions in it where documents begin; blank where a shard of it is skipped.

    The last `padding` tokens only fill it up. `targets`: see Sample.
    """

    place: Place
    tokens: NDArray[np.int64]
    document_starts: NDArray[np.int64]
    padding: int
    blank: bool
    targets: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class DocumentPart:
    """Tokens [begin, end) of a document: its shard, its key and number there; `ends` where its end of sequence is
    among them, as the last."""

    shard: str
    key: str
    document: int
    begin: int
    end: int
    ends: bool


class SourceReader:
    """The windows of one source. Which shards are skipped depends only on the files and on the run's ledger."""

    def __init__(
        self,
        source: Source,
        index: int,
        config: StreamConfig,
        skipped: SkippedShards | None,
        ahead: ReadAhead[ShardFile],
    ) -> None:
        """Without `skipped`, damage is an error. Raises DataError without a whole sample, and where too few are left.

        `index` is the source's number in the mixture.
        """
        self.source = source
        self._config = config
        self.order = _build_order(source, index, config)
        self._keys = [shard_key(shard.file, shard.sha256) for shard in source.manifest.shards]
        self._samples = SourceSamples(str(source.folder), frozenset(self._keys), self.order.num_windows)
        self._skipped = skipped
        if skipped:
            skipped.require_share(self._samples)
        self._blank: set[int] = set()
        self._hashed: set[int] = set()
        self._used: set[int] = set()
        self._open: OrderedDict[int, ShardFile] = OrderedDict()
        # The current group, the one that follows it, and what a window may need beside where shards are tiny.
        self._most_open = 2 * config.shuffle_shards + self.order.most_shards() - 1
        self._ahead = ahead
        self._coming: dict[int, Future[ShardFile]] = {}
        self._looked_at = range(0)
        self._index = index
        self._packed_shards: OrderedDict[tuple[int, int], PackedShard] = OrderedDict()

    def location(self, shard: int) -> str:
        """The path or URL of a shard."""
        return self.source.folder.location(self.source.manifest.shards[shard].file)

    def window(self, number: int) -> Window:
        """Sample `number` of this source. Raises DataError where its shard is damaged and may not be skipped."""
        if self._config.read_ahead and number not in self._looked_at:
            shards, until = self.order.coming_shards(number)
            self._looked_at = range(number, until)
            for shard in shards:
                if shard not in self._open and shard not in self._coming and shard not in self._blank:
                    self._coming[shard] = self._ahead.submit(partial(self._opened, shard))
        place = self.order.place(number)
        if self.source.packing:
            return self._packed_window(number, place)
        tokens = np.empty(self._config.seq_len + 1, np.int64)
        starts: list[NDArray[np.int64]] = []
        filled = 0
        for part in self.order.parts(place):
            shard = self._shard(part.shard)
            if shard is None:
                return self.blank_window(number)
            end = filled + part.end - part.begin
            starts.append(shard.read_into(tokens[filled:end], part.begin) + filled)
            filled = end
        return Window(place, tokens, starts[0] if len(starts) == 1 else np.concatenate(starts), 0, blank=False)

    def documents(self, number: int) -> list[DocumentPart]:
        """The parts of documents in a sample, in its order; none where a shard of it is skipped."""
        place, found = self.order.place(number), list[DocumentPart]()
        if self.source.packing is None:
            spans = self.order.parts(place)
        else:
            spans = self._packed(place.epoch, place.shard).parts(place.window) if self._shard(place.shard) else []
        for span in spans:
            shard = self._shard(span.shard)
            if shard is None:
                return []
            for document, begin, end in shard.documents_between(span.begin, span.end):
                place_of = self.location(span.shard), shard.key(document), document
                found.append(DocumentPart(*place_of, begin, end, end > int(shard.lengths[document])))
        return found

    def _packed_window(self, number: int, place: Place) -> Window:
        """Pieces of documents, each of which begins a document or goes on with one from where it was cut."""
        shard = self._shard(place.shard)
        if shard is None:
            return self.blank_window(number)
        # What fills the sample up is no target, so that it does not matter what it is.
        tokens = np.full(self._config.seq_len + 1, self.source.manifest.eos_id, np.int64)
        pieces = self._packed(place.epoch, place.shard).pieces(place.window)
        *starts, filled = shard.read_pieces(tokens, *pieces)
        targets = shard.targets_of_pieces(pieces[0], starts) if self._config.with_targets else None
        return Window(place, tokens, np.array(starts, np.int64), len(tokens) - filled, False, targets)

    def _packed(self, epoch: int, number: int) -> PackedShard:
        """The samples of an open shard in an epoch; those of a few shards are kept."""
        kept = self._packed_shards.get((epoch, number))
        if kept is not None:
            return kept
        assert self.source.packing is not None
        plan = PackingPlan.of(self._open[number].lengths, self._config.seq_len, self.source.packing.rule)
        if plan.summary != self.source.packing.shards[number]:
            message = f"{self.location(number)}: its sidecar has changed. Copy it again, and start the run again."
            raise DataError(message)
        packed = packed_shard(plan, self._config.seed, self._index, epoch, number)
        self._packed_shards[epoch, number] = packed
        if len(self._packed_shards) > self._most_open:
            self._packed_shards.popitem(last=False)
        return packed

    def blank_window(self, number: int) -> Window:
        """Sample `number` without what it holds; no shard is opened for it."""
        nothing = np.full(self._config.seq_len + 1, self.source.manifest.eos_id, np.int64)
        return Window(self.order.place(number), nothing, np.empty(0, np.int64), 0, blank=True)

    def _shard(self, number: int) -> ShardFile | None:
        """The opened shard, None where it is skipped; the least recently used one is closed where too many are open."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        if number in self._blank:
            return None
        # Before a shard is opened: all ranks must go without a shard that one of them has found damaged.
        if self._skipped and self._skipped.refresh():
            self._require_agreement(self._skipped)
        if self._skipped and self._keys[number] in self._skipped:
            self._blank.add(number)
            return None
        try:
            shard = self._taken(number)
        except DamagedFileError as damage:
            if self._skipped is None or self._skipped.is_closed:
                raise
            self._skip(number, damage, self._skipped)
            return None
        self._used.add(number)
        self._open[number] = shard
        if len(self._open) > self._most_open:
            self._open.popitem(last=False)
        return shard

    def _taken(self, number: int) -> ShardFile:
        """The shard as the thread ahead has opened it; opened here where it has not begun to, or could not."""
        future = self._coming.pop(number, None)
        if future is not None and not future.cancel():
            try:
                return future.result()
            except (DataError, CancelledError):
                pass  # what failed some time ago may be well by now: only what is found at its use counts
        return self._opened(number)

    def _opened(self, number: int) -> ShardFile:
        verify = self._config.verify
        hashed = verify == "always" or (verify == "first" and number not in self._hashed)
        shard = self.source.folder.open_shard(self.source.manifest, number, hashed)
        if hashed:
            self._hashed.add(number)
        return shard

    def _skip(self, number: int, damage: DamagedFileError, skipped: SkippedShards) -> None:
        sha256 = self.source.manifest.shards[number].sha256
        shard = SkippedShard(self.location(number), sha256, damage.actual, damage.reason, self.order.windows_of(number))
        skipped.add(shard, self._samples)
        self._blank.add(number)
        self._open.pop(number, None)

    def _require_agreement(self, skipped: SkippedShards) -> None:
        """Raise DataError where another rank skips a shard that this one has already taken samples from.

        Ranks that hold parts of one model must see the same samples. After a restart they do: all read the ledger.
        """
        for number in sorted(self._used - self._blank):
            if self._keys[number] in skipped:
                raise DataError(
                    f"{self.location(number)}: another rank found it damaged, but this one has already used it: it "
                    "changed, or the ranks do not see the same files. Start the run again: it goes on without this "
                    f"shard, which {skipped.path} lists."
                )


def _build_order(source: Source, index: int, config: StreamConfig) -> ContinuousOrder | SampleOrder:
    """Raises DataError where the source holds no whole sample."""
    shards, seq_len, rest = source.manifest.shards, config.seq_len, (config.seed, index, config.shuffle_shards)
    if source.packing:
        if not source.packing.samples:
            dropped = f" of at most data.seq_len = {seq_len} tokens" if source.manifest.num_documents else ""
            raise DataError(f"{source.folder}: holds no documents{dropped}. Write shards from some text.")
        return SampleOrder([shard.samples for shard in source.packing.shards], seq_len, *rest)
    advice = "Lower data.seq_len, or write shards from more text."
    if config.windows == "per_shard":
        windows = [shard.num_windows(seq_len) for shard in shards]
        if sum(windows):
            return SampleOrder(windows, seq_len, *rest)
        longest = max((shard.stream_tokens for shard in shards), default=0)
        raise DataError(
            f"{source.folder}: no shard holds a whole sample of {seq_len} + 1 tokens; its largest has {longest} with "
            f"ends of sequence. {advice}"
        )
    lengths = [shard.stream_tokens for shard in shards]
    if sum(lengths) > seq_len:
        return ContinuousOrder(lengths, seq_len, *rest)
    raise DataError(
        f"{source.folder}: holds {sum(lengths)} tokens with ends of sequence, less than the {seq_len} + 1 of one "
        f"sample. {advice}"
    )
