"""From the stream of samples to the micro-batches of this rank, step by step, prepared ahead of the engine."""

import copy
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from llmtrain.config.batch_sizes import BatchSizes
from llmtrain.config.data import DataConfig, DataSetConfig, SourceConfig
from llmtrain.data.mixture import Phase
from llmtrain.data.objectives.causal import stack_samples
from llmtrain.data.objectives.table import pack_sample
from llmtrain.data.packing_table import packing_of
from llmtrain.data.row_config import RowConfig
from llmtrain.data.storage.folders import fetch_config
from llmtrain.data.storage.manifest import Manifest
from llmtrain.data.storage.skipped import LEDGER_NAME, SkippedShards
from llmtrain.data.stream import SampleOrigin, SampleStream, StreamConfig, load_sources, sample_limit
from llmtrain.data.target_sources import require_targets
from llmtrain.values.batch import Batch

Window = tuple[int, int]
"""Global samples [first, end) that a run passes over, whatever its layout and batch size."""


def build_stream(
    sources: Sequence[DataSetConfig],
    data: DataConfig,
    seed: int,
    run_dir: Path | None = None,
    once: bool = False,
    manifests: Sequence[Manifest] | None = None,
) -> SampleStream:
    """The stream of a mixture of data sets; with `once`, what lies behind a source's end is blank.

    `manifests` are those of the sources, which are read where they are not given. Raises DataError where one is damaged
    or written with another tokenizer.

    With data.on_corrupt = skip, the shards that the run goes without are listed in its folder; without `run_dir` damage
    is an error.
    """
    paths, weights = [source.path for source in sources], [source.weight for source in sources]
    ahead, windows = data.prefetch_steps > 0, data.windows or "continuous"
    phases = () if once else tuple(Phase(phase.first_sample, phase.weights) for phase in data.schedule)
    rest = (windows, data.needs_targets, once, phases)
    config = StreamConfig(seed, data.seq_len, data.shuffle_shards, data.verify, ahead, *rest)
    skipped = None
    if run_dir is not None and data.on_corrupt == "skip":
        skipped = SkippedShards(run_dir / LEDGER_NAME, data.max_skipped)
    loaded = load_sources(paths, weights, fetch_config(data), manifests)
    require_targets([source.manifest for source in loaded], [str(source.folder) for source in loaded], data)
    mixed = []
    for source, asked in zip(loaded, sources, strict=True):
        packing = packing_of(source.folder, source.manifest, data)
        limit = None
        if isinstance(asked, SourceConfig) and not once:
            limit = sample_limit(asked, data, source.manifest, packing)
        mixed.append(replace(source, packing=packing, max_samples=limit))
    return SampleStream(mixed, config, skipped)


class BatchLoader:
    """This rank's micro-batches.

    A step holds the next samples of the stream that lie in no skipped window, as many as its batch has. Micro-batch j
    of it holds samples [j * micro_batch_size, (j + 1) * micro_batch_size) of them whatever the layout; data-parallel
    rank r takes micro-batches r, r + dp_size, ...
    """

    def __init__(
        self,
        stream: SampleStream,
        row_config: RowConfig,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
    ) -> None:
        """Sizes are in samples; micro_batch_size * dp_size divides global_batch_size."""
        self._stream = stream
        self._row_config = row_config
        self.global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._skipped: list[Window] = []
        self._sizes = self._fitting(BatchSizes((global_batch_size,)))

    def skipping(self, windows: Iterable[Window]) -> "BatchLoader":
        """The same loader, which passes over these windows too. They may overlap."""
        other = copy.copy(self)
        other._skipped = sorted([*self._skipped, *windows])
        return other

    def sized(self, sizes: BatchSizes) -> "BatchLoader":
        """The same loader, whose steps have these sizes in samples."""
        other = copy.copy(self)
        other._sizes = self._fitting(sizes)
        return other

    def _fitting(self, sizes: BatchSizes) -> BatchSizes:
        assert all(size % (self._micro_batch_size * self._dp_size) == 0 for size in sizes.sizes)
        assert 0 <= self._dp_rank < self._dp_size
        return sizes

    def steps(self, first_sample: int, first_step: int = 1) -> Generator[list[Batch], None, None]:
        """Each step's micro-batches, from step `first_step` and position `first_sample` of the stream on, without end.

        Steps are prepared ahead in one thread, which ends when the iterator is closed. Raises DataError, where the
        step that needs a damaged shard is due.
        """
        places = self._places(first_sample, first_step)
        if not self._row_config.data.prefetch_steps:
            for step, first in places:
                yield self._step(step, first)
        # One worker: steps are prepared in order, and a source's open shards are not made for two threads.
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        try:
            prepared: deque[Future[list[Batch]]] = deque()
            while True:
                while len(prepared) < self._row_config.data.prefetch_steps + 1:
                    prepared.append(thread.submit(self._step, *next(places)))
                yield prepared.popleft().result()
        finally:
            thread.shutdown(cancel_futures=True)  # waits for the step in hand: it holds files of the stream

    def _places(self, first_sample: int, step: int) -> Generator[tuple[int, int], None, None]:
        """A step and where it begins in the stream, one after the other without end."""
        while True:
            yield step, first_sample
            first_sample += self.step_length(first_sample, step)
            step += 1

    @property
    def steps_once(self) -> int:
        """How many steps from the first sample on have all that each source holds, read once."""
        return -(-self._stream.length_once // self.global_batch_size)

    def step_length(self, first_sample: int, step: int = 1) -> int:
        """How far a step that begins at a position of the stream moves on in it, samples passed over included."""
        return self.step_samples(first_sample, step)[-1] + 1 - first_sample

    def step_origins(self, first_sample: int, step: int = 1) -> list[SampleOrigin]:
        """The origins of all samples, on every rank, of the step that begins at a position of the stream."""
        return [self._stream.origin(number) for number in self.step_samples(first_sample, step)]

    def source_tokens(self, position: int) -> list[int]:
        """The tokens of data of each source that steps have read up to a position of the stream, padding included."""
        counts = self._stream.counts(position)
        reached = 0
        for first, end in self._skipped:  # they may overlap
            first, end = max(first, reached), min(end, position)
            if first < end:
                passed = zip(self._stream.counts(first), self._stream.counts(end), strict=True)
                counts = [count - (after - before) for count, (before, after) in zip(counts, passed, strict=True)]
            reached = max(reached, end)
        return [count * self._stream.seq_len for count in counts]

    def step_samples(self, first_sample: int, step: int = 1) -> Sequence[int]:
        """The numbers of a whole step's samples, of all ranks, in their order."""
        size, numbers = self._sizes.of_step(step), list[int]()
        for first, end in self._skipped:
            missing = size - len(numbers)
            numbers.extend(range(first_sample, min(first, first_sample + missing)))
            if len(numbers) == size:
                return numbers
            first_sample = max(first_sample, end)
        return [*numbers, *range(first_sample, first_sample + size - len(numbers))]

    def position_behind(self, first_sample: int, num_samples: int) -> int:
        """The position of the stream behind so many samples from a position on; skipped windows are passed over."""
        for first, end in self._skipped:
            room = max(0, first - first_sample)
            if num_samples <= room:
                break
            num_samples, first_sample = num_samples - room, max(first_sample, end)
        return first_sample + num_samples

    def own_micro_batches(self, step: int = 1) -> range:
        """The numbers of the micro-batches of a step that are this rank's."""
        return range(self._dp_rank, self._sizes.of_step(step) // self._micro_batch_size, self._dp_size)

    def _step(self, step: int, first_sample: int) -> list[Batch]:
        batches = []
        samples, size = self.step_samples(first_sample, step), self._micro_batch_size
        for number in self.own_micro_batches(step):
            numbers = samples[number * size : (number + 1) * size]
            rows = [pack_sample(self._stream.sample(sample), self._row_config) for sample in numbers]
            batches.append(stack_samples(rows, numbers[0]))
        return batches
