"""Jobs of data pipelines: what Ray is asked for, and what its shell does with that."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.on_ray.job_plan import JobPlan, plan_pipeline_job
from launch.on_ray.jobs import Job, exit_code_of
from llmtrain.config.reading.pipeline import load_pipeline
from tests.unit.launch.on_slurm.test_batch_script import RECORD, put_command

PIPELINE = """\
name: corpus
read:
  - {path: 'raw/*.jsonl', name: forum}
  - {path: 'https://host/x.jsonl', name: web}
tokenizer: 'https://user:canary@host/x.model?sig=canary'
steps: [normalize, {pii: {mails: false}}, {quality: {rules: [c4]}}]
run: {address: 'other:6379', backend: ray, workers: 3}
"""
HOSTILE = ("it's $(touch owned)", 'a "quoted" `touch owned`', "né; touch owned &", "-rf $HOME", "two\nlines", "[a]*")


def planned(folder: Path) -> JobPlan:
    (folder / "pipeline.yaml").write_text(PIPELINE, "utf-8")
    return plan_pipeline_job(load_pipeline(folder / "pipeline.yaml").config, folder)


def test_the_job_has_the_pipeline_on_its_own_cluster(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    (tmp_path / "uploaded.yaml").write_text(plan.config_text, "utf-8")
    expected = load_pipeline(tmp_path / "pipeline.yaml").config.with_keys({"run.address": None})
    assert load_pipeline(tmp_path / "uploaded.yaml").config == expected
    # Relative paths stay: names of documents hold them, and the order of documents is drawn from names.
    assert [source.path for source in expected.read] == ["raw/*.jsonl", "https://host/x.jsonl"]
    assert plan.run_folder == tmp_path / "data" / "corpus"
    assert plan.env_vars == {"LLMTRAIN_JOB_FOLDER": str(tmp_path), "RAY_JOB_STOP_WAIT_TIME_S": "90"}


def test_secrets_are_uploaded_and_not_shown(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    shown = (plan.shown_text, plan.entrypoint, repr(plan), *plan.env_vars.values(), *plan.metadata.values())
    assert "canary" in plan.config_text and not any("canary" in text for text in shown)


@pytest.mark.parametrize("name", HOSTILE)
def test_the_job_works_in_the_folder_of_its_submission_whatever_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Ray unpacks what was uploaded in a folder of its own, and gives the entrypoint to a shell there."""
    folder, uploaded, commands = tmp_path / name, tmp_path / f"working {name}", tmp_path / f"bin {name}"
    folder.mkdir()
    uploaded.mkdir()
    put_command(commands, "llmtrain", RECORD)
    monkeypatch.setattr(sys, "executable", str(commands / "python"))
    planned(tmp_path)
    plan = plan_pipeline_job(load_pipeline(tmp_path / "pipeline.yaml").config, folder)
    environment = {"PATH": "/usr/bin:/bin", "SANDBOX": str(tmp_path), "HOME": str(tmp_path), **plan.env_vars}
    line = ["/bin/sh", "-c", plan.entrypoint]
    done = subprocess.run(line, cwd=uploaded, env=environment, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    words = [os.fsdecode(word) for word in (tmp_path / "arguments").read_bytes().split(b"\0")[:-1]]
    assert words == ["data", "run", f"{uploaded}/pipeline.yaml"]
    assert (tmp_path / "folder").read_text("utf-8") == f"{folder}\n"
    assert list(tmp_path.rglob("owned")) == []


def test_a_stopped_job_continues_with_the_same_command(tmp_path: Path) -> None:
    """Ray does not keep the exit code of what it has stopped; of a pipeline nothing is lost that was done."""
    assert exit_code_of(Job("a", "STOPPED", None, ""), planned(tmp_path)) == 75
    assert exit_code_of(Job("a", "FAILED", 3, ""), planned(tmp_path)) == 3
