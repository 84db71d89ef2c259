"""What a pipeline needs is looked for before it starts, or is submitted: inputs, lists, packages."""

from pathlib import Path
from typing import Any

import pytest

from data_pipelines.pipeline.planning import storage_problems
from llmtrain.config.pipelines.schema import PipelineConfig


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a[1].txt").write_text("text")
    (tmp_path / "list.txt").write_text("word")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def problems(paths: list[str], *steps: Any, tokenizer: str | None = None) -> dict[str, str]:
    read = [{"path": path, "name": str(number)} for number, path in enumerate(paths)]
    tokens = None if tokenizer is None else {"path": tokenizer}
    config = PipelineConfig.model_validate({"name": "x", "read": read, "steps": list(steps), "tokenizer": tokens})
    return {problem.key: problem.message for problem in storage_problems(config)}


@pytest.mark.parametrize("path", ["raw", "raw/a[1].txt", "raw/*.txt", "**/*.txt", "https://gone/x.txt", "s3://b/*.gz"])
def test_inputs_that_are_there_or_are_a_servers(path: str) -> None:
    assert problems([path]) == {}


def test_everything_that_is_missing_is_named() -> None:
    found = problems(
        ["raw", "gone", "raw/*.jsonl"],
        "normalize",
        {"words": {"files": ["list.txt", "words.txt"]}},
        {"urls": {"domains": ["raw"]}},
        tokenizer="gone.model",
    )
    assert list(found) == ["read.1.path", "read.2.path", "steps.1.words", "steps.2.urls", "tokenizer.path"]
    assert found["read.1.path"] == "no such file, folder or pattern with files. Check the spelling."
    assert found["steps.1.words"] == "words.txt: no such file. Check the path."
