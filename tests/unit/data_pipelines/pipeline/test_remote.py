"""Inputs behind a URL: fetched as a task needs them, asked for again where the server may answer later."""

import gzip
import json
from pathlib import Path

import pytest

from llmtrain.errors import LlmtrainError
from tests.support.collections import documents_of, run_quietly, source_texts
from tests.support.http_folder import HttpFolder, serve


def write_inputs(folder: Path) -> None:
    rows = "".join(
        json.dumps({"text": text, "id": f"row-{number}"}) + "\n" for number, text in enumerate(source_texts(6))
    )
    (folder / "rows.jsonl").write_text(rows)
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(rows.encode()))


def pipeline(folder: Path, server: HttpFolder, *names: str, name: str = "remote") -> Path:
    read = [{"path": f"{server.url}/{file}", "id": "id"} for file in names]
    config = {"name": name, "output_dir": str(folder / "out"), "read": read, "chunk_bytes": 5_000}
    path = folder / "pipeline.yaml"
    path.write_text(json.dumps(config, indent=1))
    return path


@pytest.mark.parametrize("faults", [[], ["503"], ["cut", "500"]])
def test_files_behind_a_url_are_read(tmp_path: Path, faults: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmtrain.data.storage.remote.FIRST_PAUSE_SECONDS", 0.01)
    (tmp_path / "served").mkdir()
    write_inputs(tmp_path / "served")
    with serve(tmp_path / "served") as server:
        server.faults["rows.jsonl.gz"] = list(faults)  # pyright: ignore[reportArgumentType]
        result = run_quietly(pipeline(tmp_path, server, "rows.jsonl.gz", "rows.jsonl"))
    documents = documents_of(result)
    assert [document["id"] for document in documents] == [f"row-{number}" for number in range(6)] * 2
    assert [document["text"] for document in documents[:6]] == source_texts(6)


@pytest.mark.parametrize(("fault", "says"), [("404", "there is no such file"), ("403", "the server answers 403")])
def test_what_is_not_there_ends_the_pipeline_by_name(tmp_path: Path, fault: str, says: str) -> None:
    (tmp_path / "served").mkdir()
    write_inputs(tmp_path / "served")
    with serve(tmp_path / "served") as server:
        server.forever["rows.jsonl"] = fault  # pyright: ignore[reportArgumentType]
        with pytest.raises(LlmtrainError, match=rf"rows\.jsonl: {says}"):
            run_quietly(pipeline(tmp_path, server, "rows.jsonl"))


def test_another_file_behind_the_url_is_refused(tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    write_inputs(tmp_path / "served")
    with serve(tmp_path / "served") as server:
        path = pipeline(tmp_path, server, "rows.jsonl")
        result = run_quietly(path)
        (result / "summary.json").unlink()
        with (tmp_path / "served" / "rows.jsonl").open("a") as file:
            file.write('{"text": "one more", "id": "new"}\n')
        with pytest.raises(LlmtrainError, match="was begun as another pipeline or with other inputs"):
            run_quietly(path)
