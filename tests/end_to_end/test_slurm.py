"""Runs and pipelines on a real Slurm with two nodes: submitted, preempted, requeued, cancelled, killed, given up."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import psutil
import pytest

from llmtrain.runs.audit import iter_events
from tests.architecture.source_tree import ROOT
from tests.support.collections import tree_hash, write_collection, write_pipeline
from tests.support.command import COMMAND, ENVIRONMENT, llmtrain
from tests.support.slurm import TIMEOUT_SECONDS, NoSlurmError, Slurm, running_slurm

TWO_BY_TWO = ("launch.num_workers=4", "launch.slurm.nodes=2", "train.global_batch_size=32")
LONG = ("train.steps=100000", "evaluate.every_steps=0", "checkpoint.every_steps=0")


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    try:
        with running_slurm() as cluster:
            yield cluster
    except NoSlurmError as error:
        pytest.skip(str(error))


def submit(slurm: Slurm, folder: Path, *overrides: str, config: str = "run.yaml") -> str:
    """Submit a run as a user does; returns the job's id."""
    line = [COMMAND, "submit", config, "--to", "slurm", *overrides]
    environment = {**ENVIRONMENT, **slurm.environment}
    done = subprocess.run(
        line, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\d+\n", done.stdout)
    return done.stdout.strip()


def log_of(run: Path, job: str) -> str:
    return (run / "logs" / f"slurm-{job}.log").read_text("utf-8", "replace")


def last_step(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    complete = metrics.read_text("utf-8").rpartition("\n")[0] if metrics.exists() else ""
    return json.loads(complete.rpartition("\n")[2])["step"] if complete else 0


def wait_for_step(slurm: Slurm, job: str, run: Path, step: int) -> None:
    """Wait until a running job's run has finished a step."""
    slurm.wait(job, lambda facts: facts["JobState"] in ("PENDING", "RUNNING"))

    def there(facts: dict[str, str]) -> bool:
        assert facts["JobState"] in ("PENDING", "RUNNING"), log_of(run, job)
        return last_step(run) >= step

    slurm.wait(job, there)


def rank_processes(run: Path) -> list[int]:
    """The process of each rank of the newest attempt, as their logs say."""
    logs = sorted((run / "logs").glob("rank-*.log"))
    return [int(re.findall(r"^=== .* process (\d+)$", log.read_text("utf-8"), re.MULTILINE)[-1]) for log in logs]


def wait_for_other_ranks(run: Path, before: list[int], process: Callable[[], dict[str, str]]) -> list[int]:
    """The processes of the ranks once all of them are new ones."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while set(now := rank_processes(run)) & set(before) or len(now) < len(before):
        assert time.monotonic() < deadline and process()["JobState"] == "RUNNING"
        time.sleep(0.05)
    return now


def processes_of(run: Path) -> list[list[str]]:
    """The command lines of what still runs in the folder of a run."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        if process.info["cwd"] == str(run.parent.parent) and "llmtrain" in " ".join(process.info["cmdline"] or []):
            found.append(process.info["cmdline"])
    return found


def everybody() -> Iterator[psutil.Process]:
    return psutil.process_iter(["cmdline"])


def weights(run: Path) -> dict[str, str]:
    """The hash of every file of tensors of the newest checkpoint."""
    newest = max((run / "checkpoints").glob("step-*"))
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in sorted(newest.glob("*.safetensors"))}


@pytest.mark.parametrize("backend", ["slurm", pytest.param("ray", marks=pytest.mark.whole_grid)])
def test_preempted_and_requeued_it_ends_with_the_same_bits(slurm: Slurm, workspace: Path, backend: str) -> None:
    """In a folder whose name a shell would run, and sbatch would cut."""
    strange = workspace / "a 'b' \"c\" #%j $(touch d) é"
    strange.mkdir()
    (strange / "data").symlink_to((workspace / "data").resolve())
    (strange / "run.yaml").write_bytes((workspace / "run.yaml").read_bytes())
    overrides = (*TWO_BY_TWO, "train.steps=60", "evaluate.every_steps=0", "checkpoint.every_steps=1000")
    run = strange / "runs" / "tiny"
    job = submit(slurm, strange, *overrides, f"launch.backend={backend}")
    wait_for_step(slurm, job, run, 3)
    tokens = [path.read_text("utf-8") for path in strange.glob(".ray-*/token") if path.stat().st_mode & 0o777 == 0o600]
    assert len(tokens) == (backend == "ray")
    assert not any(token in " ".join(process.info["cmdline"] or []) for token in tokens for process in everybody())
    slurm.run("scancel", "--signal=USR1", "--batch", job)
    slurm.wait(job, lambda facts: facts["Restarts"] == "1")
    saved = last_step(run)
    assert 3 <= saved < 60
    facts = slurm.wait_for_end(job)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("COMPLETED", "0:0", "1")

    log = log_of(run, job)
    assert log.index(f"preempted at step {saved}/60") < log.index("done at step 60/60")
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == [f"step-{saved:08d}", "step-00000060"]
    assert processes_of(run) == []
    assert sorted(path.name for path in strange.iterdir()) == ["data", "run.yaml", "runs"]
    undisturbed = llmtrain("train", "run.yaml", *overrides, "name=whole", folder=strange)
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert weights(run) == weights(run.parent / "whole") != {}


@pytest.mark.whole_grid
def test_without_the_requeue_in_the_script_it_stays_stopped(slurm: Slurm, workspace: Path) -> None:
    """What the test above rests on is done by the script, not by Slurm."""
    done = llmtrain("submit", "run.yaml", "--to", "slurm", "--dry-run", *LONG, folder=workspace)
    assert done.returncode == 0, done.stderr
    assert "    scontrol requeue" in done.stdout
    (workspace / "broken.sbatch").write_text(done.stdout.replace("scontrol requeue", "true"), "utf-8")
    run = workspace / "runs" / "tiny"
    (run / "logs").mkdir(parents=True)
    job = slurm.run("sbatch", "--parsable", "broken.sbatch", folder=workspace)
    wait_for_step(slurm, job, run, 2)
    slurm.run("scancel", "--signal=USR1", "--batch", job)
    facts = slurm.wait_for_end(job)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "75:0", "0")


@pytest.mark.whole_grid
def test_a_killed_rank_is_started_again_in_the_same_job(slurm: Slurm, workspace: Path) -> None:
    """Submitted by hand, with the number of ranks on the command line of sbatch."""
    environment = {**slurm.environment, "PATH": f"{Path(COMMAND).parent}:{os.environ['PATH']}"}
    overrides = ("train.steps=60", "train.global_batch_size=32", "checkpoint.every_steps=5", "evaluate.every_steps=0")
    line = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1", "--time=10"]
    script = [str(ROOT / "slurm" / "train.sbatch"), "run.yaml", *overrides]
    job = Slurm(slurm.folder, environment).run(*line, *script, folder=workspace)
    run = workspace / "runs" / "tiny"
    slurm.wait(job, lambda facts: any((run / "checkpoints").glob("step-*")) or facts["JobState"] == "FAILED")
    killed = rank_processes(run)[2]
    os.kill(killed, signal.SIGKILL)
    facts = slurm.wait_for_end(job)
    log = (workspace / f"slurm-{job}.log").read_text("utf-8")
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "0"), log
    events = list(iter_events(run, "restarting"))
    assert [(event["rank"], event["cause"]) for event in events] == [(2, "was killed by SIGKILL")]
    assert "starting again (attempt 2), from the checkpoint of step" in log
    assert "done at step 60/60" in log


@pytest.mark.whole_grid
def test_a_lost_task_costs_its_step_only(slurm: Slurm, workspace: Path) -> None:
    """The process that forks a rank is killed: the launcher starts other tasks."""
    run = workspace / "runs" / "tiny"
    job = submit(slurm, workspace, *TWO_BY_TWO, "train.steps=60", "checkpoint.every_steps=5")
    slurm.wait(job, lambda facts: any((run / "checkpoints").glob("step-*")) or facts["JobState"] == "FAILED")
    psutil.Process(rank_processes(run)[3]).parent().kill()
    facts = slurm.wait_for_end(job)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "0"), log_of(run, job)
    events = list(iter_events(run, "restarting"))
    assert [event["rank"] for event in events] == [3]
    assert "its task has ended without a word" in events[0]["cause"]


@pytest.mark.whole_grid
def test_a_stopped_rank_is_found_by_the_watchdog(slurm: Slurm, workspace: Path) -> None:
    run = workspace / "runs" / "tiny"
    keys = ("launch.num_workers=2", "launch.slurm.nodes=2", "train.steps=60", "checkpoint.every_steps=5")
    job = submit(slurm, workspace, *keys, "launch.watchdog.step_seconds=8", "launch.watchdog.data_seconds=8")
    slurm.wait(job, lambda facts: any((run / "checkpoints").glob("step-*")) or facts["JobState"] == "FAILED")
    os.kill(rank_processes(run)[1], signal.SIGSTOP)
    facts = slurm.wait_for_end(job)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "0"), log_of(run, job)
    [event] = iter_events(run, "restarting")
    assert event["rank"] == 1
    assert "its process is stopped (SIGSTOP)" in event["cause"]
    assert "rank 0" in (run / "logs" / "stacks.txt").read_text("utf-8")


@pytest.mark.whole_grid
def test_cancelled_it_saves_and_does_not_come_back(slurm: Slurm, workspace: Path) -> None:
    run = workspace / "runs" / "tiny"
    job = submit(slurm, workspace, *LONG, "launch.num_workers=2", "launch.slurm.nodes=2")
    wait_for_step(slurm, job, run, 3)
    slurm.run("scancel", job)
    facts = slurm.wait_for_end(job)
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0")
    assert f"preempted at step {last_step(run)}/" in (run / "logs" / "rank-00000.log").read_text("utf-8")
    assert processes_of(run) == []
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{last_step(run):08d}"]
    done = llmtrain("checkpoint", "verify", "runs/tiny", folder=workspace)
    assert done.returncode == 0, done.stderr


@pytest.mark.whole_grid
def test_a_crash_loop_is_given_up_and_not_requeued(slurm: Slurm, workspace: Path) -> None:
    run = workspace / "runs" / "tiny"
    overrides = (*LONG, "launch.num_workers=2", "launch.slurm.nodes=2", "launch.max_stalled_attempts=2")
    job = submit(slurm, workspace, *overrides)
    wait_for_step(slurm, job, run, 2)
    first = rank_processes(run)
    os.kill(first[1], signal.SIGKILL)
    second = wait_for_other_ranks(run, first, lambda: slurm.facts(job))
    os.kill(second[0], signal.SIGKILL)
    facts = slurm.wait_for_end(job)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "93:0", "0"), log_of(run, job)
    assert "given up: 2 attempts in a row ended without a newer checkpoint" in log_of(run, job)
    assert json.loads((run / "status.json").read_text("utf-8"))["status"] == "stalled"
    assert processes_of(run) == []


ON_RAY = ("run.backend=ray", "run.slurm.nodes=2", "run.workers=4")


@pytest.mark.parametrize(
    "overrides", [("run.workers=2",), pytest.param(ON_RAY, marks=pytest.mark.whole_grid)], ids=["processes", "ray"]
)
def test_a_pipeline_that_is_preempted_and_requeued_gives_the_same(
    slurm: Slurm, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    """With relative paths, in a folder whose name a shell would run."""
    folder = tmp_path / "a 'b' $(touch d)"
    folder.mkdir()
    expected = write_relative_pipeline(folder)
    job, result = submit_pipeline(slurm, folder, *overrides)
    slurm.run("scancel", "--signal=USR1", "--batch", job)
    facts = slurm.wait(job, lambda facts: facts["Restarts"] == "1" or facts["JobState"] in ("COMPLETED", "FAILED"))
    assert facts["Restarts"] == "1", log_of(result, job)
    assert not (result / "summary.json").exists()
    facts = slurm.wait_for_end(job)
    log = log_of(result, job)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("COMPLETED", "0:0", "1"), log
    assert log.index("USR1: finishing what is under way") < log.index("done before")
    assert tree_hash(result) == expected
    wait_for_none(result)
    assert sorted(path.name for path in folder.iterdir()) == ["out", "pipeline.yaml", "raw", "whole"]


@pytest.mark.whole_grid
def test_a_pipeline_that_is_cancelled_does_not_come_back_by_itself(slurm: Slurm, tmp_path: Path) -> None:
    """Slurm ends its processes, too: that is no failure of theirs."""
    expected = write_relative_pipeline(tmp_path)
    job, result = submit_pipeline(slurm, tmp_path, "run.workers=2")
    slurm.run("scancel", job)
    facts = slurm.wait_for_end(job)
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0")
    wait_for_none(result)
    log = log_of(result, job)
    assert re.search(r"^stopped( before|, with tasks under way)", log, re.MULTILINE) and "Traceback" not in log
    again = submit(slurm, tmp_path, "run.workers=2", config="pipeline.yaml")
    assert slurm.wait_for_end(again)["ExitCode"] == "0:0"
    assert tree_hash(result) == expected


def wait_for_none(result: Path) -> None:
    """Wait until no process of a pipeline is left: the server of its workers hears of the end by a pipe."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while processes_of(result):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def write_relative_pipeline(folder: Path) -> str:
    """A pipeline with relative paths, and the hash of its result where nothing disturbs it."""
    write_collection(folder, 60)
    read = [{"path": "raw/text", "name": "text"}, {"path": "raw/rows.jsonl", "name": "rows"}]
    write_pipeline(folder, output_dir="whole", read=read, chunk_bytes=20_000)
    done = llmtrain("data", "run", "pipeline.yaml", folder=folder)
    assert done.returncode == 0, done.stderr
    write_pipeline(folder, output_dir="out", read=read, chunk_bytes=20_000)
    return tree_hash(folder / "whole" / "corpus")


def submit_pipeline(slurm: Slurm, folder: Path, *overrides: str) -> tuple[str, Path]:
    """Submit it and wait until some tasks are done; returns the job's id and the folder of the result."""
    job = submit(slurm, folder, *overrides, config="pipeline.yaml")
    result = folder / "out" / "corpus"

    def under_way(facts: dict[str, str]) -> bool:
        assert facts["JobState"] in ("PENDING", "RUNNING"), log_of(result, job)
        return len(list(result.glob("done/*"))) >= 3

    slurm.wait(job, under_way)
    return job, result
