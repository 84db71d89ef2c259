"""Samples are read as a task's templates say; faulty lines are named, all together."""

from pathlib import Path
from typing import Any

import pytest

from llmtrain.config.tasks.schema import TaskConfig
from llmtrain.data.tasks.samples import read_samples
from llmtrain.errors import DataError, PathError
from tests.support.evaluated_run import write_lines

ROWS = [{"q": "one", "c": ["x", "y"], "a": 1}, {"q": "two", "c": ["z", "w", "v"], "a": 0}]


def task_of(folder: Path, rows: Any = ROWS, **keys: Any) -> TaskConfig:
    path = write_lines(folder / "data.jsonl", rows)
    base = {"name": "t", "data": str(path), "prompt": "Q {q}:", "choices": ("{c}",), "answer": "{a}"}
    return TaskConfig.model_validate({**base, **keys})


def test_choices_follow_the_prompt(tmp_path: Path):
    first, second = read_samples(task_of(tmp_path))
    assert (first.prompt, first.continuations, first.choices, first.target) == ("Q one:", (" x", " y"), ("x", "y"), 1)
    assert second.continuations == (" z", " w", " v")
    assert len(read_samples(task_of(tmp_path), limit=1)) == 1


@pytest.mark.parametrize(("answer_is", "answer"), [("index", "1"), ("letter", "b"), ("text", "y")])
def test_an_answer_is_a_place_a_letter_or_a_text(tmp_path: Path, answer_is: str, answer: str):
    task = task_of(tmp_path, [{**ROWS[0], "a": answer}], answer_is=answer_is)
    assert read_samples(task)[0].target == 1
    with pytest.raises(DataError, match=r"data\.jsonl:1: has the answer '9'"):
        read_samples(task_of(tmp_path, [{**ROWS[0], "a": "9"}], answer_is=answer_is))


def test_examples_stand_before_each_prompt(tmp_path: Path):
    shown = write_lines(tmp_path / "shown.jsonl", ROWS)
    task = task_of(tmp_path, ROWS[:1], examples=2, examples_data=str(shown), description="Do it.\n")
    assert read_samples(task)[0].prompt == "Do it.\nQ one: y\n\nQ two: z\n\nQ one:"
    with pytest.raises(DataError, match=r"has 2 samples, and .*examples = 3"):
        read_samples(task_of(tmp_path, examples=3, examples_data=str(shown)))


def test_every_faulty_line_is_named(tmp_path: Path):
    task = task_of(tmp_path)
    Path(task.data).write_bytes(b'{"q": "one"}\n\nnonsense\n[1]\n{"q": null, "c": ["a", "b"], "a": 0}\n\xff\n')
    with pytest.raises(DataError) as caught:
        read_samples(task)
    found = str(caught.value).replace(str(tmp_path), "")
    for expected in (
        "/data.jsonl:1: has no 'c'", "/data.jsonl:3: is not JSON", "/data.jsonl:4: is not a JSON object",
        "/data.jsonl:5: has null in 'q'", "/data.jsonl:6: is not JSON in UTF-8",
    ):  # fmt: skip
        assert expected in found


def test_files_that_are_missing_or_empty_are_named(tmp_path: Path):
    with pytest.raises(PathError, match=r"none\.jsonl: no such file \(task t\)"):
        read_samples(task_of(tmp_path, data=str(tmp_path / "none.jsonl")))
    with pytest.raises(DataError, match="has no samples"):
        read_samples(task_of(tmp_path, rows=[]))
