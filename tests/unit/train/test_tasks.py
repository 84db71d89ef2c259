"""Tasks in training: the numbers of `llmtrain eval` on the checkpoint of the step, interrupted or not, and shown."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.rank.place import Rank
from llmtrain.checkpoint.folders import step_folder_name
from llmtrain.cli import main
from llmtrain.config.reading.tasks import load_tasks
from llmtrain.config.schema import RunConfig
from llmtrain.errors import DataError
from llmtrain.infer.evaluation.run import EvaluationOptions, evaluate_tasks
from llmtrain.infer.model import load_model
from llmtrain.infer.text_model import TextModel
from llmtrain.observe.charts import scalars
from llmtrain.report.page import write_report
from llmtrain.report.run_record import load_run, task_columns
from llmtrain.runs.metrics_file import iter_rows
from llmtrain.train import tasks as training
from llmtrain.train.loop import Run
from llmtrain.train.tasks import TaskEvaluation
from llmtrain.values.progress import TASK, row_kind
from tests.support.chats import sentencepiece_file
from tests.support.evaluated_run import QUESTIONS, TEXTS, write_lines, write_run_data
from tests.support.ranks import run_ranks
from tests.support.small_runs import rows_of, small_run, train_here

TASKS = """tasks:
  - {name: pick, data: QUESTIONS, prompt: '{q}', choices: ['{options}'], answer: '{a}'}
  - {name: gap, kind: cloze, data: QUESTIONS, prompt: '{q}', answer: '{animal}', examples: 1, examples_data: QUESTIONS}
"""
TEXT = "  - {name: text, kind: perplexity, data: TEXTS, prompt: '{text}', max_length: 20}\n"
ENCODES: dict[str, Any] = {
    "model": {"family": "encoder_decoder", "num_encoder_layers": 2, "position": "t5_relative", "vocab_size": None},
    "data": {"objective": "span_corruption"},
}


def task_sections(folder: Path, with_text: bool = True) -> dict[str, dict[str, Any]]:
    """Of a run of 6 steps that is measured at the 3rd and at the 6th, and saved there."""
    files = {"QUESTIONS": write_lines(folder / "q.jsonl", QUESTIONS), "TEXTS": write_lines(folder / "t.jsonl", TEXTS)}
    content = TASKS + (TEXT if with_text else "")
    for name, file in files.items():
        content = content.replace(name, str(file))
    (folder / "tasks.yaml").write_text(content, "utf-8")
    return {
        "train": {"steps": 6},
        "checkpoint": {"every_steps": 3},
        "evaluate": {"tasks": [str(folder / "tasks.yaml")], "tasks_every_steps": 3},
    }


def task_run(folder: Path, with_text: bool = True, **sections: dict[str, Any]) -> RunConfig:
    """A run on texts."""
    base = task_sections(folder, with_text)
    return write_run_data(folder, **{n: {**base.get(n, {}), **sections.get(n, {})} for n in {**base, **sections}})


def measured(config: RunConfig) -> dict[int, dict[str, float]]:
    """The metrics of tasks by step."""
    return {
        row["step"]: {key: value for key, value in row.items() if key.startswith(TASK)}
        for row in rows_of(config)
        if row_kind(row) == "tasks"
    }


def evaluated(config: RunConfig, step: int) -> dict[str, float]:
    """What `llmtrain eval` says of a checkpoint, under the names of the rows."""
    checkpoint = config.run_dir / "checkpoints" / step_folder_name(step)
    model = TextModel(load_model(checkpoint, torch.device("cpu")))
    tasks = load_tasks([Path(file) for file in config.evaluate.tasks])
    results = evaluate_tasks(model, tasks, EvaluationOptions(lambda *_: None))
    return {
        f"{TASK}{name}/{metric}": value for name, result in results.items() for metric, value in result.metrics.items()
    }


def assert_equal(config: RunConfig) -> None:
    found = measured(config)
    assert list(found) == [3, 6] and found[3] != found[6]
    for step, metrics in found.items():
        assert metrics == pytest.approx(evaluated(config, step), rel=1e-5)


@pytest.mark.parametrize("sections", [{}, ENCODES], ids=["decoder", "encoder_decoder"])
def test_scores_in_training_are_those_of_an_evaluation(tmp_path: Path, sections: dict[str, Any]) -> None:
    config = task_run(tmp_path, with_text=not sections, **sections)
    assert train_here(config) == 0
    assert_equal(config)


def test_a_model_of_conversations_reads_texts_as_documents(tmp_path: Path) -> None:
    talks = write_lines(tmp_path / "talks.jsonl", [{"prompt": row["q"], "completion": "a tree"} for row in QUESTIONS])
    tokenizer, out = sentencepiece_file(tmp_path / "tokenizer.model"), tmp_path / "out"
    rest = ["--tokenizer", str(tokenizer), "--template", "chatml", "--valid-fraction", "0"]
    with pytest.raises(SystemExit) as ended:
        main(["data", "chat", str(talks), str(out), *rest])
    assert not ended.value.code
    config = small_run(
        tmp_path,
        model={"num_layers": 2, "hidden_size": 32, "num_heads": 4, "vocab_size": None, "max_seq_len": 96},
        data={
            "train": [{"path": str(out / "train")}],
            "valid": [],
            "objective": "chat",
            "seq_len": 96,
            "cache_dir": str(tmp_path),
        },
        optim={"lr": 5e-3, "warmup_steps": 0},
        **task_sections(tmp_path),
    )
    assert train_here(config) == 0
    assert_equal(config)


FINETUNES: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "lora": {"rank": 4, "alpha": 8.0}},
    "prompt": {"method": "prompt", "prompt": {"tokens": 8}},
}


@pytest.mark.parametrize("method", FINETUNES)
def test_what_finetuning_adds_is_measured_with_it(tmp_path: Path, method: str) -> None:
    model = {"max_seq_len": 64}
    base = task_run(tmp_path, model=model)
    assert train_here(base) == 0
    finetune = {**FINETUNES[method], "base": str(base.run_dir)}
    tuned = base.with_keys({"name": method, "finetune": finetune, "optim.lr": 0.05})
    assert train_here(tuned) == 0
    assert_equal(tuned)


@dataclass(frozen=True)
class Killed(TaskEvaluation):
    """An evaluation that is killed in its midst."""

    def run(self, engine: Any) -> dict[str, float]:
        if engine.state()["updates"] == 6:
            TaskEvaluation(self.tasks[:1], self.every_steps, self.dealing).run(engine)
            raise RuntimeError("killed")
        return super().run(engine)


def killed_at_the_end(run: Run, place: Rank) -> Run:
    return replace(run, tasks=Killed(**{each.name: getattr(run.tasks, each.name) for each in fields(run.tasks)}))


def test_an_evaluation_that_was_killed_is_done_again(tmp_path: Path) -> None:
    whole = task_run(tmp_path)
    config = whole.with_keys({"name": "killed"})
    assert train_here(whole) == 0
    with pytest.raises(RuntimeError, match="killed"):
        train_here(config, killed_at_the_end)
    assert list(measured(config)) == [3] and not (config.run_dir / "checkpoints" / step_folder_name(6)).exists()
    assert train_here(config) == 0
    assert measured(config) == measured(whole)


def test_metrics_are_shown_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = task_run(tmp_path, evaluate={"every_steps": 3}, observe={"tensorboard": True})
    assert train_here(config) == 0
    said = capsys.readouterr().err
    (row,) = (row for row in rows_of(config) if row["step"] == 6 and row_kind(row) == "tasks")
    assert f"step 6: pick: accuracy {row['task/pick/accuracy']:.4f}" in said
    assert [row_kind(row) for row in iter_rows(config.run_dir / "metrics.jsonl") if row["step"] == 6] == [
        "training", "evaluation", "tasks",
    ]  # fmt: skip
    record = load_run(config.run_dir)
    assert task_columns([record])[:1] == ["task/pick/accuracy"]
    assert record.curve("task/text/byte_perplexity")[1][-1] == row["task/text/byte_perplexity"]
    assert len(record.rows) == 6 and len(record.evaluations) == 2
    assert record.efficiency.evaluate_seconds >= row["task_seconds"]
    write_report([config.run_dir], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "pick: accuracy per byte" in page and '"task/text/byte_perplexity":[[3,6],' in page
    assert list((config.run_dir / "tensorboard").iterdir())
    assert scalars(row)["task/gap/perplexity"] == row["task/gap/perplexity"]


def read_by_a_rank(rank: int, world_size: int, answers: Mapping[int, str]) -> str:
    """Ranks that have different samples in the same place."""
    try:
        training._require_same(["tasks.yaml"], answers[rank])
    except DataError as error:
        return str(error)
    return ""


def test_ranks_that_read_different_samples_do_not_begin() -> None:
    assert run_ranks(read_by_a_rank, 2, {0: "same", 1: "same"}) == ["", ""]
    told = run_ranks(read_by_a_rank, 2, {0: "one", 1: "other"})
    assert all("evaluate.tasks = tasks.yaml: ranks have read different" in text for text in told)


def test_nothing_is_measured_without_tasks(tmp_path: Path) -> None:
    config = task_run(tmp_path, evaluate={"tasks": [], "tasks_every_steps": 0})
    assert train_here(config) == 0
    assert measured(config) == {}
    assert json.loads((config.run_dir / "status.json").read_text())["status"] == "done"
