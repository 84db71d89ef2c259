"""A run with a teacher: what it records, how it continues, and what its teacher may be."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from llmtrain.checkpoint.origin import newest_origin
from llmtrain.config.schema import RunConfig
from llmtrain.errors import ConfigError
from llmtrain.preflight.dry_run import plan_dry_run
from llmtrain.preflight.resolve import resolve
from llmtrain.preflight.storage import check_storage
from tests.support.datasets import random_documents, write_dataset
from tests.support.small_runs import rows_of, small_run, train_here, write_data

TEACHER: dict[str, Any] = {"num_layers": 2, "hidden_size": 32}


def teacher_run(folder: Path, **keys: Any) -> RunConfig:
    return small_run(folder, model=TEACHER, train={"steps": 4}).with_keys({"name": "teacher", **keys})


def student_run(folder: Path, name: str = "student", steps: int = 8, **keys: Any) -> RunConfig:
    run = small_run(folder, train={"steps": steps}, evaluate={"every_steps": 4}, optim={"decay_steps": 8})
    return run.with_keys({"name": name, "distill": {"teacher": str(folder / "runs/teacher"), "top_k": 16}, **keys})


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a teacher of 4 steps, and a student of 8."""
    folder = tmp_path_factory.mktemp("taught")
    write_data(folder)
    assert train_here(teacher_run(folder)) == 0
    assert train_here(student_run(folder)) == 0
    return folder


def faults(config: RunConfig) -> str:
    return "\n".join(map(str, check_storage(config).problems))


def test_both_losses_are_recorded_and_the_teacher_is_named(taught: Path) -> None:
    rows = rows_of(student_run(taught))
    steps = [row for row in rows if "loss" in row]
    valid = [row for row in rows if "valid_loss" in row]
    assert len(steps) == 8 and all(row["distill_loss"] > 0 for row in steps)
    assert len(valid) == 2 and all(row["valid_distill_loss"] > 0 and row["valid_perplexity"] > 1 for row in valid)
    origin, teacher = (newest_origin(taught / "runs" / name / "checkpoints") for name in ("student", "teacher"))
    assert origin is not None and teacher is not None
    assert origin.about["teacher"]["path"] == str(teacher.path.absolute())
    assert origin.config["distill"]["model"]["hidden_size"] == 32, "the folder says what it learned from"


def test_a_teacher_teaches(taught: Path) -> None:
    """With nothing but the teacher in the loss, the divergence from it falls."""
    config = student_run(
        taught, "pupil", 60, **{"distill.weight": 1.0, "optim": {"lr": 1e-2}, "checkpoint.every_steps": 0}
    )
    assert train_here(config) == 0
    taught_losses = [row["distill_loss"] for row in rows_of(config) if "distill_loss" in row]
    assert taught_losses[-1] < taught_losses[0] / 2


def test_an_interrupted_run_continues_bit_for_bit(taught: Path) -> None:
    for steps in (4, 8):
        assert train_here(student_run(taught, "again", steps)) == 0
    whole, again = (
        [row for row in rows_of(student_run(taught, name)) if "loss" in row] for name in ("student", "again")
    )
    for key in ("loss", "distill_loss", "grad_norm"):
        assert [row[key] for row in again] == [row[key] for row in whole]


def test_another_teacher_is_refused_and_can_be_allowed(taught: Path) -> None:
    shutil.copytree(taught / "runs" / "student", taught / "runs" / "moved")
    assert train_here(teacher_run(taught, name="other", seed=5)) == 0
    other = {"distill.teacher": str(taught / "runs/other"), "train.steps": 9}
    config = student_run(taught, "moved", **other)
    assert "was taught by" in faults(config) and "distill.teacher" in faults(config)
    assert faults(config.with_keys({"checkpoint.allow_change": ["distill.teacher"]})) == ""
    assert "distill.top_k" in faults(student_run(taught, "moved", **{"distill.top_k": 8}))
    without = student_run(taught, "moved").with_keys({"distill": None})
    assert "distill" in faults(without)


def test_a_teacher_that_does_not_fit_is_refused(taught: Path) -> None:
    config = student_run(taught, "new")
    assert faults(config) == ""
    assert "no such checkpoint" in faults(config.with_keys({"distill.teacher": str(taught / "runs/nobody")}))
    (taught / "hub").mkdir(exist_ok=True)
    (taught / "hub" / "config.json").write_text("{}")
    assert "llmtrain import" in faults(config.with_keys({"distill.teacher": str(taught / "hub")}))
    assert "is not the architecture" in faults(config.with_keys({"distill.model": config.model}))
    with pytest.raises(ConfigError, match="other tokens"):
        resolve(config.with_keys({"data.train": [{"path": str(other_tokenizer(taught))}], "data.valid": []}))


def other_tokenizer(folder: Path) -> Path:
    """The same training data, written with another tokenizer."""
    path = folder / "foreign"
    if not path.exists():
        write_dataset(path, [random_documents(200, 0)], tokenizer=b"another")
    return path


def test_a_finetuned_teacher_is_to_be_merged(taught: Path) -> None:
    lora = teacher_run(taught, name="lora", finetune={"base": str(taught / "runs/teacher"), "method": "lora"})
    assert train_here(lora) == 0
    assert "Merge it" in faults(student_run(taught, "new", **{"distill.teacher": str(taught / "runs/lora")}))


def test_the_dry_run_counts_the_teacher(taught: Path) -> None:
    resolved = check_storage(student_run(taught, "new")).run
    assert resolved is not None and resolved.config.distill is not None
    plan = plan_dry_run(resolved)
    weights = 4 * plan_dry_run(resolve(teacher_run(taught))).parameters
    predicted = 4 * 32 * (16 * 8 + 4)
    assert plan.memory.teacher == weights + predicted
