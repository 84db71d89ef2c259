"""From the stream of samples to the micro-batches of this rank, step by step, prepared ahead of the engine."""

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count

from llmtrain.config.schema import DataConfig, SourceConfig
from llmtrain.data.batch import Batch
from llmtrain.data.objectives import OBJECTIVES
from llmtrain.data.pack import stack_samples
from llmtrain.data.stream import SampleStream, StreamConfig, load_sources


def build_stream(sources: Sequence[SourceConfig], data: DataConfig, seed: int) -> SampleStream:
    """The stream of a mixture of data sets. Raises DataError where one is damaged or written with another tokenizer."""
    loaded = load_sources([source.path for source in sources], [source.weight for source in sources])
    return SampleStream(loaded, StreamConfig(seed, data.seq_len, data.shuffle_shards, data.verify))


class BatchLoader:
    """This rank's micro-batches.

    Micro-batch j of a step holds samples [j * micro_batch_size, (j + 1) * micro_batch_size) of that step whatever the
    layout; data-parallel rank r takes micro-batches r, r + dp_size, ...
    """

    def __init__(
        self,
        stream: SampleStream,
        data: DataConfig,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
    ) -> None:
        """Sizes are in samples; micro_batch_size * dp_size divides global_batch_size."""
        assert global_batch_size % (micro_batch_size * dp_size) == 0 and 0 <= dp_rank < dp_size
        self._stream = stream
        self._data = data
        self.global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._micro_batches = range(dp_rank, global_batch_size // micro_batch_size, dp_size)

    def steps(self, first_sample: int) -> Generator[list[Batch], None, None]:
        """Each step's micro-batches, from global sample `first_sample` on, without end.

        Steps are prepared ahead in one thread, which ends when the iterator is closed. Raises DataError, where the
        step that needs a damaged shard is due.
        """
        firsts = count(first_sample, self.global_batch_size)
        if not self._data.prefetch_steps:
            yield from map(self._step, firsts)  # without end
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        try:
            prepared: deque[Future[list[Batch]]] = deque()
            while True:
                while len(prepared) < self._data.prefetch_steps + 1:
                    prepared.append(thread.submit(self._step, next(firsts)))
                yield prepared.popleft().result()
        finally:
            thread.shutdown(cancel_futures=True)

    def _step(self, first_sample: int) -> list[Batch]:
        return [self._batch(first_sample + number * self._micro_batch_size) for number in self._micro_batches]

    def _batch(self, first_sample: int) -> Batch:
        objective = OBJECTIVES[self._data.objective]
        samples = map(self._stream.sample, range(first_sample, first_sample + self._micro_batch_size))
        return stack_samples([objective(sample, self._data) for sample in samples], first_sample)
