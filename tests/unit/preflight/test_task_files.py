"""What is wrong with a run's tasks is told before it starts, all of it, with its place."""

from pathlib import Path

import pytest

from llmtrain.config.schema import RunConfig
from llmtrain.preflight.dry_run import plan_dry_run
from llmtrain.preflight.resolve import resolve
from llmtrain.preflight.storage import check_storage
from tests.support.evaluated_run import QUESTIONS, write_lines, write_run_data
from tests.support.small_runs import small_run, write_data

GAP = "  - {name: gap, kind: cloze, data: DATA, prompt: '{q}', answer: '{animal}'}\n"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("run")
    return write_run_data(folder, evaluate={"tasks": [str(folder / "tasks.yaml")], "tasks_every_steps": 5})


def told(config: RunConfig, folder: Path, tasks: str, lines: str = "") -> list[str]:
    data = write_lines(folder / "data.jsonl", QUESTIONS)
    data.write_text(data.read_text("utf-8") + lines, "utf-8")
    file = folder / "tasks.yaml"
    file.write_text(f"tasks:\n{tasks}".replace("DATA", str(data)), "utf-8")
    found = check_storage(config.with_keys({"evaluate.tasks": [str(file)]})).problems
    assert {problem.key for problem in found} <= {"evaluate.tasks"}
    return [problem.message for problem in found]


def test_good_tasks_are_part_of_the_run(config: RunConfig, tmp_path: Path) -> None:
    assert told(config, tmp_path, GAP) == []
    run = resolve(config.with_keys({"evaluate.tasks": [str(tmp_path / "tasks.yaml")]}))
    assert [task.name for task in run.tasks] == ["gap"]
    outline = plan_dry_run(run)
    assert (outline.tasks, outline.tasks_every_steps) == (("gap",), 5)


def test_tasks_that_write_answers_are_refused(config: RunConfig, tmp_path: Path) -> None:
    asked = "  - {name: say, kind: KIND, data: DATA, prompt: '{q}', answer: '{answers}', max_tokens: 4}\n"
    for kind in ("qa", "exact_match"):
        (message,) = told(config, tmp_path, GAP + asked.replace("KIND", kind))
        assert (
            message.startswith(f"task say: kind = {kind} has the model write answers") and "`llmtrain eval`" in message
        )


def test_every_fault_is_told(config: RunConfig, tmp_path: Path) -> None:
    long, none = GAP.replace("}\n", ", max_length: 49}\n"), GAP.replace("gap", "none").replace("DATA", "no.jsonl")
    faults = told(config, tmp_path, long + none, lines='{"q": "?"}\nno JSON\n')
    assert len(faults) == 3
    assert "max_length = 49 is more than the 48 positions" in faults[0]
    assert "data.jsonl:7: has no 'animal'" in faults[1] and "data.jsonl:8: is not JSON" in faults[1]
    assert "no.jsonl: no such file" in faults[2]


def test_files_that_are_none_are_told(config: RunConfig, tmp_path: Path) -> None:
    (missing,) = check_storage(config.with_keys({"evaluate.tasks": [str(tmp_path / "no.yaml")]})).problems
    assert "no.yaml: no such file" in missing.message
    (twice,) = told(config, tmp_path, GAP + GAP)
    assert "is the name of tasks.0 too" in twice


def test_tasks_need_a_tokenizer_that_can_be_read(tmp_path: Path) -> None:
    write_data(tmp_path)
    write_lines(tmp_path / "data.jsonl", QUESTIONS)
    (tmp_path / "tasks.yaml").write_text("tasks:\n" + GAP.replace("DATA", str(tmp_path / "data.jsonl")), "utf-8")
    run = small_run(tmp_path, evaluate={"tasks": [str(tmp_path / "tasks.yaml")], "tasks_every_steps": 5})
    (problem,) = check_storage(run).problems
    assert problem.key == "data.tokenizer" and problem.message.startswith("evaluate.tasks needs it: ")
    assert check_storage(run.with_keys({"evaluate": {}})).problems == []
