"""How long the data stream takes to its first batch when a run resumes, by how far into the run that is."""

import tempfile
import time
from pathlib import Path

from llmtrain.config.data import DataConfig
from llmtrain.data.loader import BatchLoader, build_stream
from llmtrain.data.row_config import RowConfig
from tests.benchmarks.data_sets import write_random_data_set
from tests.benchmarks.measuring import Measurement, Options, Table, measure

STARTS = (1_000, 100_000, 10_000_000)
BATCH_SIZE, SEQ_LEN = 8, 2048


def benchmark(options: Options) -> list[Table]:
    """Milliseconds from the manifest to the first batch: index read, order computed, shards opened and hashed."""
    shard_tokens = 100_000 if options.quick else 50_000_000
    num_shards = 2 if options.quick else 8
    with tempfile.TemporaryDirectory() as folder:
        shards = write_random_data_set(Path(folder) / "shards", num_shards, shard_tokens, 6_000, 50_000)
        contenders: dict[str, Measurement] = {
            f"sample {start:,}, {label}": first_batch(shards, start, verify)
            for verify, label in (("off", "shards not hashed"), ("first", "shards hashed (default)"))
            for start in STARTS
        }
        rows = measure(contenders, options.rounds)
    title = f"Resume of the data stream ({num_shards} shards of {shard_tokens / 1e6:g}M tokens in the page cache)"
    notes = (f"to one batch [{BATCH_SIZE}, {SEQ_LEN}], whose samples may lie in up to {BATCH_SIZE} shards",)
    return [Table(title, "ms", "lower", rows[0].name, rows, notes)]


def first_batch(folder: Path, start: int, verify: str) -> Measurement:
    settings = {"train": [{"path": str(folder)}], "seq_len": SEQ_LEN, "verify": verify, "prefetch_steps": 0}
    data = DataConfig.model_validate(settings)

    def run() -> float:
        started = time.perf_counter()
        stream = build_stream(data.train, data, seed=0)
        loader = BatchLoader(stream, RowConfig(data, 0, stream.eos_id), BATCH_SIZE, BATCH_SIZE)
        next(loader.steps(first_sample=start))
        return 1e3 * (time.perf_counter() - started)

    return run
