"""A data pipeline in CPU time: beside its own functions in a plain loop, beside Ray Data, and its signatures beside
datasketch's."""

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import lru_cache
from pathlib import Path

from data_pipelines.cutting import tokenized
from data_pipelines.documents import Document, Dropped
from data_pipelines.duplicates.signatures import NUM_HASHES, Signatures, ngrams
from data_pipelines.steps.table import STEPS
from data_pipelines.tokenizer import train_tokenizer
from llmtrain.config.pipelines.schema import PipelineConfig
from llmtrain.config.pipelines.steps import NearDedupStep, StepConfig
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.values.tokenizer import Tokenizer
from tests.benchmarks.data_sets import TOKENIZER, standard_library_text
from tests.benchmarks.measuring import Measurement, Options, Table, measure, one_core
from tests.support.collections import run_quietly
from tests.support.readers import DATASKETCH, use_datasketch

OURS = "llmtrain data run, one process"
STEPS_OF_ALL = [{"normalize": {}}, {"quality": {"rules": ["gopher"]}}, {"exact_dedup": {}}, {"near_dedup": {}}]
_RAY_SCRIPT = Path(__file__).with_name("pipeline_on_ray_data.py")


def benchmark(options: Options) -> list[Table]:
    """Megabytes of text per CPU second, from files of JSON lines to shards."""
    with tempfile.TemporaryDirectory() as folder, one_core():
        whole = _whole(Path(folder), options)
        return [whole, _signatures(options)] if (DATASKETCH / ".installed").is_file() else [whole]


def _whole(folder: Path, options: Options) -> Table:
    texts = _texts(options)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    train_tokenizer(texts[:100], folder / TOKENIZER, 512 if options.quick else 8192)
    for number in range(8):
        lines = (json.dumps({"text": text}) for text in texts[number::8])
        (folder / f"part-{number}.jsonl").write_text("\n".join(lines) + "\n")
    settings = {
        "output_dir": str(folder / "out"),
        "read": [{"path": str(folder / "part-*.jsonl")}],
        "steps": STEPS_OF_ALL,
        "tokenizer": {"path": str(folder / TOKENIZER)},
        "chunk_bytes": 4_000_000,
    }
    number = 0

    def pipeline() -> float:
        nonlocal number
        number += 1
        started = time.process_time()
        run_quietly(PipelineConfig.model_validate({**settings, "name": f"run-{number}"}))
        return megabytes / (time.process_time() - started)

    def on_ray_data() -> float:
        line = [sys.executable, str(_RAY_SCRIPT), str(folder)]
        done = subprocess.run(line, capture_output=True, text=True, check=True)
        return megabytes / float(done.stdout.splitlines()[-1])

    contenders: dict[str, Measurement] = {
        OURS: pipeline,
        "the same functions in a loop": lambda: megabytes / _loop_seconds(folder),
    }
    if not options.quick:  # Ray takes half a minute to start
        contenders["the same functions in Ray Data"] = on_ray_data
    rows = measure(contenders, options.rounds)
    has_peer = (DATASKETCH / ".installed").is_file()
    notes = (
        *(() if has_peer else (f"no signatures: datasketch is not installed in {DATASKETCH}: make readers",)),
        "in the loop and in Ray Data nothing is hashed, synced, recorded or compared: no duplicates are removed",
        "Ray Data: CPU time of all its processes from the end of ray.init to the last block",
    )
    return Table(f"Text to shards, {megabytes:.1f} MB", "MB per CPU second", "higher", OURS, rows, notes)


def _texts(options: Options) -> list[str]:
    """Real text, and enough of it that what a run costs once does not count: halves of documents joined with halves of
    others, so that none is near another and all are tokenized by every contender."""
    texts = standard_library_text(20 if options.quick else None)
    if options.quick:
        return texts
    halves = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts]
    others = (1, 7, 31, 97, 211)
    return [
        halves[(place - other) % len(halves)][1] + first for other in others for place, (first, _) in enumerate(halves)
    ]


def processed(texts: list[str], tokenizer_path: Path) -> int:
    """The steps, keys, signatures and tokens of texts, without anything around them; returns the number of tokens."""
    steps = [StepConfig.model_validate(step) for step in STEPS_OF_ALL[:2]]
    functions = [STEPS[step.name].build(step.section) for step in steps]
    signatures = Signatures(NearDedupStep(), 1)
    kept: list[Document] = []
    for text in texts:
        document: Document | Dropped = Document("", text)
        for function in functions:
            document = function(document, Counter())
            if isinstance(document, Dropped):
                break
        else:
            hashlib.blake2b(document.text.encode(), digest_size=16).digest()
            signatures.add(document)
            kept.append(document)
    tokens = tokenized((("", document.text) for document in kept), _loaded(tokenizer_path))
    return sum(len(ids) for _, ids in tokens)


@lru_cache(maxsize=1)
def _loaded(path: Path) -> Tokenizer:
    return load_tokenizer(path)


def _loop_seconds(folder: Path) -> float:
    started = time.process_time()
    for path in sorted(folder.glob("part-*.jsonl")):
        processed([json.loads(line)["text"] for line in path.read_text().splitlines()], folder / TOKENIZER)
    return time.process_time() - started


def _signatures(options: Options) -> Table:
    """Signatures of word n-grams, the n-grams made before."""
    sets = [ngrams(text, 5) for text in standard_library_text(10 if options.quick else 300)]
    megabytes = sum(len(gram) for grams in sets for gram in grams) / 5e6

    def rensa() -> float:
        from rensa import RMinHash

        started = time.process_time()
        RMinHash.digests_from_token_sets(sets, NUM_HASHES, 1)
        return megabytes / (time.process_time() - started)

    def datasketch() -> float:
        use_datasketch()
        from datasketch import MinHash

        started = time.process_time()
        for grams in sets:
            MinHash(NUM_HASHES).update_batch([gram.encode() for gram in grams])
        return megabytes / (time.process_time() - started)

    contenders: dict[str, Measurement] = {"rensa, as llmtrain has it": rensa, "datasketch": datasketch}
    rows = measure(contenders, options.rounds)
    title = f"Signatures of {NUM_HASHES} hashes ({megabytes:.1f} MB)"
    return Table(title, "MB per CPU second", "higher", "rensa, as llmtrain has it", rows)
