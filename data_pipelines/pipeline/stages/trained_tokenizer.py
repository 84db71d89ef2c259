"""The stage `tokenizer`: one that is trained on a sample of the documents that all steps have kept."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from data_pipelines.pipeline.stages.document_files import kept_documents
from data_pipelines.pipeline.stages.sidecars import drawn_key
from data_pipelines.pipeline.work import DataTask, Output, Workspace
from data_pipelines.tokenizer import train_byte_tokenizer, train_tokenizer

_MORE_CHUNKS = 8
"""Chunks are read until they hold so many times the sample: a sample of few chunks would be of few places."""


def write_tokenizer(work: Workspace, task: DataTask, output: Output) -> dict[str, Any]:
    """Train the tokenizer; the counters say on how much. Raises ConfigError where the vocabulary does not suit."""
    assert work.config.tokenizer is not None and work.config.tokenizer.train is not None
    config = work.config.tokenizer.train
    sample = _Sample(work, config.sample_bytes)
    with TemporaryDirectory(dir=output.folder) as folder:
        suffix = ".json" if config.kind == "byte_bpe" else ".model"
        path = Path(folder) / f"tokenizer{suffix}"
        if config.kind == "byte_bpe":
            train_byte_tokenizer(iter(sample), path, config.vocab_size, config.control_pieces)
        else:
            train_tokenizer(iter(sample), path, config.vocab_size, config.kind, config.control_pieces)
        with output.file(suffix) as file:
            file.write(path.read_bytes())
    return {"documents": sample.documents, "bytes": sample.bytes}


class _Sample:
    """Documents that the seed draws, in the order of the inputs: the same for any number of workers."""

    def __init__(self, work: Workspace, sample_bytes: int) -> None:
        self.documents = self.bytes = 0
        self._work = work
        self._last = len(work.program.segments) - 1
        stage = work.program.documents(self._last).name
        numbers = sorted(
            range(len(work.plan.chunks)), key=lambda number: drawn_key(work.config.seed, number, b"sample-chunk")
        )
        held, chunks = 0, []
        for number in numbers:
            if held >= _MORE_CHUNKS * sample_bytes:
                break
            chunks.append(number)
            held += work.require_done(DataTask(stage, number)).counters["kept"]["bytes"]
        self._chunks = sorted(chunks)
        self._bound = (1 << 64) * sample_bytes // max(held, sample_bytes)

    def __iter__(self) -> Iterator[str]:
        for chunk in self._chunks:
            for found in kept_documents(self._work, self._last, chunk):
                if drawn_key(self._work.config.seed, found.document.id, b"sample") < self._bound:
                    self.documents += 1
                    self.bytes += len(found.document.text.encode())
                    yield found.document.text
