"""Weights & Biases as the command uses it: what is in its files, and what happens to training when it fails."""

import json
import os
import re
import socket
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import psutil
import pytest

from llmtrain.observe.charts import scalars
from llmtrain.runs.audit import STARTED, iter_events
from llmtrain.runs.metrics_file import iter_rows, read_rows
from tests.distributed.conftest import workspace as workspace
from tests.distributed.conftest import write_workspace
from tests.support import command
from tests.support.command import llmtrain, start_llmtrain, wait_until
from tests.support.wandb_server import serve_wandb
from tests.unit.observe.wandb_file import history, iter_records

CANARY = "canary-wandb-0123456789"
STEPS = 200
ONE_RANK = ("launch.num_workers=1", "launch.max_stalled_attempts=3")
LONG = (*ONE_RANK, f"train.steps={STEPS}", "evaluate.every_steps=100", "checkpoint.every_steps=100")
"""Long enough for something to happen to it."""

NOWHERE = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a" * 40}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of every command; it holds a secret."""
    variables = {**command.ENVIRONMENT, "HF_TOKEN": CANARY, "AWS_SECRET_ACCESS_KEY": CANARY}
    monkeypatch.setattr(command, "ENVIRONMENT", variables)
    return variables


def run_files(run: Path) -> list[Path]:
    """The file of each attempt, in the order of their numbers."""
    return sorted((run / "wandb").glob("*run-*/run-*.wandb"), key=lambda path: path.stem)


def run_record(file: Path) -> Any:
    return next(record.run for record in iter_records(file) if record.HasField("run"))


def summary(file: Path) -> dict[str, str]:
    """The last value of each metric, as JSON."""
    updates = [item for record in iter_records(file) if record.HasField("summary") for item in record.summary.update]
    return {item.key or "/".join(item.nested_key): item.value_json for item in updates}


def logged(rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    """What of rows of metrics.jsonl must be in W&B's file."""
    return [{"train/step": row["step"], **scalars(row)} for row in rows]


def losses(run: Path) -> dict[int, tuple[float, float]]:
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in read_rows(run / "metrics.jsonl") if "loss" in row}


def steps_done(run: Path) -> int:
    return len((run / "metrics.jsonl").read_bytes().splitlines()) if (run / "metrics.jsonl").exists() else 0


def test_each_attempt_is_a_run_of_one_group_with_every_row_and_no_secret(workspace: Path) -> None:
    settings = (*LONG, "observe.wandb=offline", "observe.wandb_artifacts=final", "observe.layer_norms_every_steps=100")
    process = start_llmtrain("train", "run.yaml", *settings, folder=workspace)
    run = workspace / "runs" / "tiny"
    wait_until(lambda: (run / "checkpoints" / "step-00000100").exists() and steps_done(run) > 110, process)
    process.kill()
    process.wait()
    done = llmtrain("train", "run.yaml", *settings, folder=workspace)
    assert done.returncode == 0, done.stderr

    first, second = run_files(run)
    rows = [list(part) for _, part in groupby(iter_rows(run / "metrics.jsonl"), lambda row: "valid_loss" in row)]
    rows = [row for part in rows for row in part]
    resumed = next(number for number, row in enumerate(rows) if "resumed_from" in row)
    assert history(second) == logged(rows[resumed:])
    killed = history(first)
    assert len(killed) > 50
    assert killed == logged(rows[:resumed])[: len(killed)]

    (run_id,) = {event["run_id"] for event in iter_events(run, STARTED)}
    names = [(r.run_group, r.display_name, r.run_id, r.project) for r in map(run_record, (first, second))]
    assert names == [
        ("tiny", "tiny", f"tiny-{run_id}-001", "llmtrain"),
        ("tiny", "tiny attempt 2 from step 100", f"tiny-{run_id}-002", "llmtrain"),
    ]
    last = [row for row in rows if "loss" in row][-1]
    assert last["step"] == STEPS and float(summary(second)["train/loss"]) == last["loss"]
    norms = [row for row in history(second) if "grad_norm/decoder.final_norm.weight" in row]
    assert [row["train/step"] for row in norms] == [STEPS]
    artifacts = [record.artifact for record in iter_records(second) if record.HasField("artifact")]
    assert [artifact.name for artifact in artifacts] == ["tiny-checkpoint"]
    sent = {entry.path: Path(entry.local_path) for entry in artifacts[0].manifest.contents}
    kept = {path.name: path for path in (run / "checkpoints" / "step-00000200").iterdir()}
    assert sent.keys() == kept.keys()
    assert all((workspace / sent[name]).samefile(path) for name, path in kept.items())
    assert not [record for record in iter_records(first) if record.HasField("artifact")]
    for path in (run / "wandb").rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        for private in (CANARY, os.environ["PATH"], "launch.max_stalled_attempts=3"):
            assert private.encode() not in content, path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[float, float]]:
    """The losses and norms of the long run without W&B."""
    folder = write_workspace(tmp_path_factory.mktemp("undisturbed"))
    done = llmtrain("train", "run.yaml", *LONG, folder=folder)
    assert done.returncode == 0, done.stderr
    return losses(folder / "runs" / "tiny")


def is_service(process: psutil.Process) -> bool:
    """Whether a process is W&B's own; one that is gone is not."""
    try:
        return "wandb-core" in process.name()
    except psutil.NoSuchProcess:
        return False


def check_untouched(workspace: Path, said: str, undisturbed: dict[int, tuple[float, float]]) -> None:
    assert said.count("Weights & Biases") == 1, said
    assert "Traceback" not in said, said
    assert losses(workspace / "runs" / "tiny") == undisturbed
    assert len(undisturbed) == STEPS


@pytest.mark.whole_grid
def test_without_network_the_run_is_the_same_and_kept_for_later(
    workspace: Path, environment: dict[str, str], undisturbed: dict[int, tuple[float, float]]
) -> None:
    environment.update(NOWHERE)
    done = llmtrain("train", "run.yaml", *LONG, "observe.wandb=online", folder=workspace)
    assert done.returncode == 0, done.stderr
    check_untouched(workspace, done.stderr, undisturbed)
    assert "wandb sync runs/tiny/wandb/offline-*" in done.stderr
    (file,) = run_files(workspace / "runs" / "tiny")
    assert file.parent.name.startswith("offline-run-")
    rows = logged(list(iter_rows(workspace / "runs" / "tiny" / "metrics.jsonl")))
    assert history(file) == rows

    with serve_wandb() as server:
        environment.update(server.environment)
        (sync,) = [line for line in documented_commands() if line.startswith("wandb sync")]
        line = f"{Path(sys.executable).parent}/{sync.replace('my-run', 'tiny')}"
        sent = subprocess.run(["sh", "-c", line], cwd=workspace, env=environment, capture_output=True, text=True)
        assert sent.returncode == 0, sent.stdout + sent.stderr
        assert server.history(run_record(file).run_id) == rows
        assert CANARY.encode() not in server.everything


def documented_commands() -> list[str]:
    """The commands of the page about W&B."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "operations" / "wandb.md").read_text("utf-8")
    return [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]


@pytest.mark.whole_grid
def test_online_the_server_gets_every_row_and_no_secret(workspace: Path, environment: dict[str, str]) -> None:
    online = [line for line in documented_commands() if "observe.wandb=online" in line]
    assert online == ["llmtrain train my-run.yaml observe.wandb=online"]
    arguments = online[0].replace("my-run.yaml", "run.yaml").split()[1:]
    with serve_wandb() as server:
        environment.update(server.environment)
        done = llmtrain(*arguments, *LONG, "optim.lr=2.5e-3", folder=workspace)
        assert done.returncode == 0, done.stderr
        assert "wandb" not in done.stderr.lower() and "Weights" not in done.stderr
        run = server.runs()[0]
        assert server.history(run["name"]) == logged(list(iter_rows(workspace / "runs" / "tiny" / "metrics.jsonl")))
        assert (run["groupName"], run["displayName"], run["project"]) == ("tiny", "tiny", "llmtrain")
        config = json.loads(run["config"])
        assert config["optim"]["value"]["lr"] == 2.5e-3
        assert config["run"]["value"]["parameters"] > 1000
        for private in (CANARY, os.environ["PATH"], "optim.lr=2.5e-3"):
            assert private.encode() not in server.everything, private
        assert not [sent for run in server.runs() for sent in run.values() if sent == socket.gethostname()]


@pytest.mark.whole_grid
@pytest.mark.parametrize("supervised", [True, False], ids=["supervised", "alone"])
def test_a_killed_service_leaves_training_alone(
    workspace: Path, supervised: bool, undisturbed: dict[int, tuple[float, float]]
) -> None:
    settings = LONG if supervised else (*LONG, "launch.max_stalled_attempts=0")
    process = start_llmtrain("train", "run.yaml", *settings, "observe.wandb=offline", folder=workspace)
    run = workspace / "runs" / "tiny"
    services: list[psutil.Process] = []

    def service_is_there() -> bool:
        below = psutil.Process(process.pid).children(recursive=True)
        services[:] = [child for child in below if is_service(child)]
        return bool(services) and bool(run_files(run)) and steps_done(run) > 20

    wait_until(service_is_there, process)
    for service in services:
        service.kill()
    assert process.wait(command.TIMEOUT_SECONDS) == 0
    assert steps_done(run) > STEPS
    check_untouched(workspace, (workspace / "output.txt").read_text(), undisturbed)


@pytest.mark.whole_grid
def test_a_network_that_goes_down_leaves_training_alone_and_every_row_on_the_disk(
    workspace: Path, environment: dict[str, str], undisturbed: dict[int, tuple[float, float]]
) -> None:
    run = workspace / "runs" / "tiny"
    with serve_wandb() as server:
        environment.update(server.environment)
        process = start_llmtrain("train", "run.yaml", *LONG, "observe.wandb=online", folder=workspace)
        wait_until(lambda: bool(server.runs()) and steps_done(run) > 20, process)
    assert steps_done(run) < STEPS
    assert process.wait(command.TIMEOUT_SECONDS) == 0
    check_untouched(workspace, (workspace / "output.txt").read_text(), undisturbed)
    (file,) = run_files(run)
    assert history(file) == logged(list(iter_rows(run / "metrics.jsonl")))


@pytest.mark.whole_grid
def test_a_folder_that_cannot_be_written_leaves_training_alone(
    workspace: Path, undisturbed: dict[int, tuple[float, float]]
) -> None:
    (workspace / "runs" / "tiny").mkdir(parents=True)
    (workspace / "runs" / "tiny" / "wandb").write_text("a file, where a folder is needed")
    done = llmtrain("train", "run.yaml", *LONG, "observe.wandb=offline", folder=workspace)
    assert done.returncode == 0, done.stderr
    check_untouched(workspace, done.stderr, undisturbed)
