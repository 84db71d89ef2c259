"""The samples of one source: their order, its open shards and those that come next, and those that are skipped."""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from llmtrain.config.data import WindowKind
from llmtrain.data.order import ContinuousOrder, Place, SampleOrder
from llmtrain.data.storage.folders import DataFolder
from llmtrain.data.storage.manifest import DamagedFileError, Manifest
from llmtrain.data.storage.shard_file import ShardFile
from llmtrain.data.storage.skipped import SkippedShard, SkippedShards, SourceSamples, shard_key
from llmtrain.errors import DataError

Result = TypeVar("Result")
Task = tuple[Future[Result], Callable[[], Result]]


class ReadAhead(Generic[Result]):
    """Does tasks in the order in which they are given, until nobody holds this object any more.

    Unlike an executor's, the thread keeps no process alive that wants to end: nothing depends on its tasks.
    """

    def __init__(self) -> None:
        self._tasks: SimpleQueue[Task[Result] | None] = SimpleQueue()
        self._started = False

    def submit(self, action: Callable[[], Result]) -> Future[Result]:
        """Ask for the result of an action. A future that is cancelled in time is never begun."""
        future: Future[Result] = Future()
        self._tasks.put((future, action))
        if not self._started:
            self._started = True
            threading.Thread(target=_work, args=(self._tasks,), name="read-ahead", daemon=True).start()
            weakref.finalize(self, self._tasks.put, None)
        return future


def _work(tasks: SimpleQueue[Task[Result] | None]) -> None:
    while _do_next(tasks):
        pass


def _do_next(tasks: SimpleQueue[Task[Result] | None]) -> bool:
    """A function of its own: while the thread waits for a task, nothing of the one before is held any more."""
    task = tasks.get()
    if task is None:
        return False
    future, action = task
    if future.set_running_or_notify_cancel():
        # Whoever waits for the future gets the error, whatever it is.
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)
    return True


Verify = Literal["off", "first", "always"]


@dataclass(frozen=True)
class Source:
    """A data set of the mixture, with its manifest already read."""

    folder: DataFolder
    manifest: Manifest
    weight: int = 1


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
    once: bool = False
    """Read each source through once: samples behind that are blank."""


@dataclass(frozen=True)
class Window:
    """A sample's place, tokens, and positions in it where documents begin; blank where a shard of it is skipped."""

    place: Place
    tokens: NDArray[np.int64]
    document_starts: NDArray[np.int64]
    blank: bool


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
        return Window(place, tokens, starts[0] if len(starts) == 1 else np.concatenate(starts), blank=False)

    def blank_window(self, number: int) -> Window:
        """Sample `number` without what it holds; no shard is opened for it."""
        nothing = np.full(self._config.seq_len + 1, self.source.manifest.eos_id, np.int64)
        return Window(self.order.place(number), nothing, np.empty(0, np.int64), blank=True)

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
            if self._skipped is None:
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
