"""Small collections of real text, the pipelines over them, and what their results are compared by."""

import hashlib
import json
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from data_pipelines.pipeline.executors import Executor, InThisProcess
from data_pipelines.pipeline.progress import Progress
from data_pipelines.pipeline.run import run_pipeline
from llmtrain.config.pipelines.schema import PipelineConfig
from llmtrain.config.reading.pipeline import load_pipeline
from llmtrain.data.storage.manifest import DTYPES, read_manifest

STDLIB = Path(sysconfig.get_path("stdlib"))

RESULT = ("train", "valid", "documents", "summary.json", "report.html", "tokenizer.model", "tokenizer.json")
"""What a pipeline is for; beside it lie records of how it was done."""


def source_texts(number: int) -> list[str]:
    """The source of so many modules of the standard library."""
    files = sorted(path for path in STDLIB.glob("*.py") if 2_000 < path.stat().st_size < 30_000)
    return [path.read_text("utf-8") for path in files[:number]]


def write_collection(folder: Path, number: int = 40) -> Path:
    """A folder `raw` with text in several formats, and with documents that are the same and nearly the same."""
    raw = folder / "raw"
    (raw / "text").mkdir(parents=True)
    texts = source_texts(number)
    for place, text in enumerate(texts[: number // 2]):
        (raw / "text" / f"{place:03d}.txt").write_text(text, "utf-8")
    rows = [{"text": text, "name": f"row-{place}"} for place, text in enumerate(texts[number // 2 :])]
    rows.append({"text": texts[0], "name": "the same"})
    words = texts[1].split(" ")
    words[len(words) // 2] = "something_else"
    rows.append({"text": " ".join(words), "name": "nearly the same"})
    lines = [json.dumps(row) for row in rows]
    lines.insert(3, '{"text": "cut off')
    (raw / "rows.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return raw


def pipeline_text(folder: Path, **changes: Any) -> str:
    """A pipeline's file over `write_collection`, as YAML that is JSON; `changes` replace whole sections."""
    config: dict[str, Any] = {
        "name": "corpus",
        "output_dir": str(folder / "out"),
        "read": [
            {"path": str(folder / "raw" / "text"), "name": "text"},
            {"path": str(folder / "raw" / "rows.jsonl"), "name": "rows", "id": "name"},
        ],
        "steps": ["normalize", "exact_dedup", {"length": {"min_words": 50}}, {"near_dedup": {"threshold": 0.8}}],
        "tokenizer": {"train": {"vocab_size": 600}},
        "write": {"shard_tokens": 30_000, "valid_fraction": 0.1},
        "run": {"workers": 1},
        "chunk_bytes": 60_000,
    }
    return json.dumps({**config, **changes}, indent=1)


def write_pipeline(folder: Path, **changes: Any) -> Path:
    """The file of such a pipeline."""
    path = folder / "pipeline.yaml"
    path.write_text(pipeline_text(folder, **changes), "utf-8")
    return path


def run_quietly(config: PipelineConfig | Path, executor: Executor | None = None) -> Path:
    """Run a pipeline without a word; returns its folder."""
    loaded = load_pipeline(config).config if isinstance(config, Path) else config
    return run_pipeline(loaded, executor or InThisProcess(), Progress(Console(quiet=True)))


def tree_hash(folder: Path) -> str:
    """One hash of a pipeline's result: names and contents."""
    digest = hashlib.sha256()
    paths = [path for name in RESULT for path in sorted([folder / name, *(folder / name).rglob("*")])]
    for path in paths:
        if path.is_file():
            digest.update(f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def documents_of(folder: Path) -> list[dict[str, Any]]:
    """The cleaned documents of a finished pipeline that keeps them."""
    from backports import zstd

    found = []
    for path in sorted((folder / "documents").iterdir()):
        with zstd.ZstdFile(path) as file:
            found += [json.loads(line) for line in file]
    return found


def shard_documents(dataset: Path) -> Iterator[NDArray[Any]]:
    """The ids of each document of a data set, in the order of its shards."""
    manifest = read_manifest(dataset)
    for shard in manifest.shards:
        with tarfile.open(dataset / shard.file) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                yield np.frombuffer(file.read(), DTYPES[manifest.dtype])
