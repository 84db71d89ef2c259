"""From the stream of samples to the micro-batches of this rank, step by step, prepared ahead of the engine."""

import copy
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from llmtrain.config.data import DataConfig, SourceConfig
from llmtrain.data.objectives.causal import stack_samples
from llmtrain.data.objectives.table import pack_sample
from llmtrain.data.row_config import RowConfig
from llmtrain.data.storage.folders import fetch_config
from llmtrain.data.storage.manifest import Manifest
from llmtrain.data.storage.skipped import LEDGER_NAME, SkippedShards
from llmtrain.data.stream import SampleOrigin, SampleStream, StreamConfig, load_sources
from llmtrain.values.batch import Batch

Window = tuple[int, int]
"""Global samples [first, end) that a run passes over, whatever its layout and batch size."""


def build_stream(
    sources: Sequence[SourceConfig],
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
    config = StreamConfig(seed, data.seq_len, data.shuffle_shards, data.verify, ahead, windows, once)
    skipped = None
    if run_dir is not None and data.on_corrupt == "skip":
        skipped = SkippedShards(run_dir / LEDGER_NAME, data.max_skipped)
    return SampleStream(load_sources(paths, weights, fetch_config(data), manifests), config, skipped)


class BatchLoader:
    """This rank's micro-batches.

    A step holds the next global_batch_size samples of the stream that lie in no skipped window. Micro-batch j of it
    holds samples [j * micro_batch_size, (j + 1) * micro_batch_size) of them whatever the layout; data-parallel rank r
    takes micro-batches r, r + dp_size, ...
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
        assert global_batch_size % (micro_batch_size * dp_size) == 0 and 0 <= dp_rank < dp_size
        self._stream = stream
        self._row_config = row_config
        self.global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._micro_batches = range(dp_rank, global_batch_size // micro_batch_size, dp_size)
        self._skipped: list[Window] = []

    def skipping(self, windows: Iterable[Window]) -> "BatchLoader":
        """The same loader, which passes over these windows too. They may overlap."""
        other = copy.copy(self)
        other._skipped = sorted([*self._skipped, *windows])
        return other

    def steps(self, first_sample: int) -> Generator[list[Batch], None, None]:
        """Each step's micro-batches, from position `first_sample` of the stream on, without end.

        Steps are prepared ahead in one thread, which ends when the iterator is closed. Raises DataError, where the
        step that needs a damaged shard is due.
        """
        while not self._row_config.data.prefetch_steps:
            yield self._step(first_sample)
            first_sample += self.step_length(first_sample)
        # One worker: steps are prepared in order, and a source's open shards are not made for two threads.
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        try:
            prepared: deque[Future[list[Batch]]] = deque()
            while True:
                while len(prepared) < self._row_config.data.prefetch_steps + 1:
                    prepared.append(thread.submit(self._step, first_sample))
                    first_sample += self.step_length(first_sample)
                yield prepared.popleft().result()
        finally:
            thread.shutdown(cancel_futures=True)  # waits for the step in hand: it holds files of the stream

    @property
    def steps_once(self) -> int:
        """How many steps from the first sample on have all that each source holds, read once."""
        return -(-self._stream.length_once // self.global_batch_size)

    def step_length(self, first_sample: int) -> int:
        """How far a step that begins at a position of the stream moves on in it, samples passed over included."""
        return self._samples(first_sample)[-1] + 1 - first_sample

    def step_origins(self, first_sample: int) -> list[SampleOrigin]:
        """The origins of all samples, on every rank, of the step that begins at a position of the stream."""
        return [self._stream.origin(number) for number in self._samples(first_sample)]

    def _samples(self, first_sample: int) -> Sequence[int]:
        """The numbers of a whole step's samples."""
        numbers: list[int] = []
        for first, end in self._skipped:
            missing = self.global_batch_size - len(numbers)
            numbers.extend(range(first_sample, min(first, first_sample + missing)))
            if len(numbers) == self.global_batch_size:
                return numbers
            first_sample = max(first_sample, end)
        return [*numbers, *range(first_sample, first_sample + self.global_batch_size - len(numbers))]

    def _step(self, first_sample: int) -> list[Batch]:
        batches = []
        samples, size = self._samples(first_sample), self._micro_batch_size
        for number in self._micro_batches:
            numbers = samples[number * size : (number + 1) * size]
            rows = [pack_sample(self._stream.sample(sample), self._row_config) for sample in numbers]
            batches.append(stack_samples(rows, numbers[0]))
        return batches
