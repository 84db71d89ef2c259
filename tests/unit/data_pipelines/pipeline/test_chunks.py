"""Chunks: together they are the inputs, and a document's number does not depend on where a file is divided."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.pipeline.chunks import InputChunk, ScannedFile, SourceFile, chunks_of, scanned
from data_pipelines.reading.formats import iter_records
from data_pipelines.reading.inputs import InputFile, ReadReport
from data_pipelines.reading.records import ReadOptions
from llmtrain.config.pipelines.schema import ReadConfig
from llmtrain.errors import DataError


def read_in_spans(path: Path, config: ReadConfig, chunk_bytes: int) -> tuple[list[tuple[str, str]], int]:
    """Places and texts of a file that is read chunk by chunk, and the number of spans."""
    source = InputFile(str(path), True)
    scan = scanned(source, config, chunk_bytes)
    options = ReadOptions(separator=config.separator)
    found = []
    for span in scan.spans or (None,):
        for record in iter_records(source, ReadReport(forgiving=True), options, None, span):
            if record.text:
                found.append((record.place, record.text))
    return found, len(scan.spans)


@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=30),
    chunk_bytes=st.integers(10, 300),
    last=st.booleans(),
)
def test_lines_are_the_same_wherever_a_file_is_divided(
    texts: list[str], chunk_bytes: int, last: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n" * last)
    config = ReadConfig(path=str(path))
    whole, _ = read_in_spans(path, config, 10**9)
    divided, spans = read_in_spans(path, config, chunk_bytes)
    assert divided == whole == [(str(number), text) for number, text in enumerate(texts, 1) if text]
    assert spans >= (path.stat().st_size > 4 * max(chunk_bytes, 250))


@given(
    parts=st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="|\ufeff"), max_size=40), min_size=1
    ),
    separator=st.sampled_from(["|", "||||", "|=|", "|\n"]),
    chunk_bytes=st.integers(8, 200),
    block=st.integers(1, 64),
)
def test_parts_are_the_same_wherever_a_file_is_divided(
    parts: list[str], separator: str, chunk_bytes: int, block: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("parts") / "a.txt"
    path.write_bytes(separator.join(parts).encode())
    config = ReadConfig(path=str(path), separator=separator)
    whole, _ = read_in_spans(path, config, 10**9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_pipelines.pipeline.chunks.BLOCK_BYTES", block)
        patch.setattr("data_pipelines.reading.opened.BLOCK_BYTES", block)
        divided, _ = read_in_spans(path, config, chunk_bytes)
    assert divided == whole == [(str(number), text) for number, text in enumerate(parts, 1) if text]


def test_a_table_is_divided_at_its_groups_of_rows(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    texts = [f"document {number} " * 20 for number in range(1000)]
    parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=100, compression="none")
    config = ReadConfig(path=str(path))
    divided, spans = read_in_spans(path, config, path.stat().st_size // 4)
    assert divided == [(str(number), text) for number, text in enumerate(texts, 1)]
    assert 4 <= spans <= 10


def test_packed_files_are_whole_and_small_files_are_together(tmp_path: Path) -> None:
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"text": "a"}\n' * 10_000, 1))
    assert scanned(InputFile(str(packed), True), ReadConfig(path="x"), 10).spans == ()

    def file(size: int) -> ScannedFile:
        return ScannedFile(SourceFile("f", True, size, "1", "2"))

    sizes = [(0, 40), (0, 50), (0, 20), (0, 500), (0, 1), (1, 1), (1, 99)]
    chunks = list(chunks_of([(source, file(size)) for source, size in sizes], 100))
    assert [(chunk.source, chunk.bytes) for chunk in chunks] == [(0, 90), (0, 20), (0, 500), (0, 1), (1, 100)]
    assert [piece.file for chunk in chunks for piece in chunk.pieces] == list(range(len(sizes)))
    assert all(isinstance(chunk, InputChunk) for chunk in chunks)


def test_a_file_that_changed_since_it_was_planned_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    file = scanned(InputFile(str(path), True), ReadConfig(path=str(path)), 1000).file
    assert file.input.name == str(path)
    path.write_text("another")
    with pytest.raises(DataError, match="was changed since the pipeline was planned"):
        _ = file.input
