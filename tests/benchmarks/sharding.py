"""Raw text to shards on one core, beside the tokenizer library alone on the same text."""

import shutil
import tempfile
import time
from pathlib import Path

import sentencepiece

from data_pipelines.dataset_writer import ShardingConfig
from data_pipelines.sharding import write_shards
from data_pipelines.tokenizer import train_tokenizer
from tests.benchmarks.data_sets import TOKENIZER, standard_library_text
from tests.benchmarks.measuring import Measurement, Options, Table, measure, one_core

OURS = "llmtrain: text to shards"


def benchmark(options: Options) -> list[Table]:
    """Megabytes of text per second. Both begin with text in memory; shards are hashed, indexed and on the disk."""
    vocab_size, num_documents = (512, 10) if options.quick else (8192, None)
    documents = standard_library_text(num_documents)
    megabytes = sum(len(text.encode()) for text in documents) / 1e6
    with tempfile.TemporaryDirectory() as folder, one_core():
        root = Path(folder)
        tokenizer = train_tokenizer(documents[:100], root / TOKENIZER, vocab_size)
        library = sentencepiece.SentencePieceProcessor(model_file=str(root / TOKENIZER))

        def shards() -> float:
            started = time.perf_counter()
            write_shards(documents, root / "shards", tokenizer, ShardingConfig())
            seconds = time.perf_counter() - started
            shutil.rmtree(root / "shards")
            return megabytes / seconds

        def library_alone() -> float:
            started = time.perf_counter()
            library.encode(documents, return_type="numpy", num_threads=1)
            return megabytes / (time.perf_counter() - started)

        contenders: dict[str, Measurement] = {OURS: shards, "sentencepiece alone": library_alone}
        rows = measure(contenders, options.rounds)
    title = f"Raw text to shards on one core ({megabytes:.1f} MB, vocabulary {vocab_size})"
    return [Table(title, "MB/s", "higher", OURS, rows)]
