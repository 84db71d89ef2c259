"""Runs and pipelines as Ray jobs, on a real cluster with a token; what such a cluster and our own say to strangers."""

import http.client
import json
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launch.on_ray.access import ask_head
from tests.distributed.conftest import workspace as workspace
from tests.distributed.test_local_launcher import last_row, losses, status, tensors
from tests.support.collections import source_texts, tree_hash, write_collection, write_pipeline
from tests.support.command import COMMAND, ENVIRONMENT, llmtrain, wait_until
from tests.support.ray_cluster import RayHead, outward_address, ray_head

RAY = str(Path(sys.executable).with_name("ray"))
CANARIES = {
    "WANDB_API_KEY": "canary0123456789012345678901234567890123",
    "HF_TOKEN": "hf_canary_abcdef",
    "AWS_SECRET_ACCESS_KEY": "canary/secret/key",
    "PASSED_ON": "seen-by-the-ranks",
}


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with ray_head(num_cpus=3) as found:
        yield found


def on(head: RayHead, *arguments: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environ = {**ENVIRONMENT, **head.environ, "RAY_API_SERVER_ADDRESS": head.dashboard, **variables}
    return subprocess.run(
        [COMMAND, *arguments], cwd=folder, env=environ, capture_output=True, text=True, timeout=300, check=False
    )


def answer_of(url: str, token: str = "", timeout_seconds: float = 30.0) -> int:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        return urllib.request.urlopen(request, timeout=timeout_seconds).status
    except urllib.error.HTTPError as error:
        return error.code


def test_strangers_are_sent_away(head: RayHead) -> None:
    jobs = f"{head.dashboard}/api/jobs/"
    assert (answer_of(jobs), answer_of(jobs, "wrong"), answer_of(jobs, head.token)) == (401, 403, 200)
    assert (ask_head(head.address), ask_head(head.address, "wrong")) == ("refuses", "refuses")
    assert ask_head(head.address, head.token) == "answers"


def test_a_followed_job_trains_as_the_command_does(head: RayHead, workspace: Path) -> None:
    assert llmtrain("train", "run.yaml", "name=local", folder=workspace).returncode == 0
    done = on(head, "submit", "run.yaml", "--to", "ray", "--follow", "name=job", folder=workspace)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"job-\d{8}-\d{6}-[0-9a-f]{4}\n", done.stdout)
    assert done.stderr.splitlines()[-1].startswith("done at step 20/20")
    local, job = workspace / "runs" / "local", workspace / "runs" / "job"
    assert losses(local) == losses(job)
    assert tensors(local, 20) == tensors(job, 20)
    said = on(head, "submit", "run.yaml", "--to", "ray", "--status", "name=job", folder=workspace)
    assert said.stdout == f"{done.stdout.strip()} SUCCEEDED exit code 0\n"
    log = on(head, "submit", "run.yaml", "--to", "ray", "--logs", "name=job", folder=workspace)
    assert "done at step 20/20" in log.stdout


@pytest.mark.whole_grid
def test_a_failed_job_ends_with_the_runs_exit_code(head: RayHead, workspace: Path) -> None:
    wrong = on(head, "submit", "run.yaml", "--to", "ray", "train.global_batch_size=7", folder=workspace)
    assert wrong.returncode == 2 and "train.global_batch_size = 7" in wrong.stderr and wrong.stdout == ""
    done = on(head, "submit", "run.yaml", "--to", "ray", "--follow", folder=workspace)
    assert done.returncode == 0, done.stderr
    damaged = workspace / "runs" / "tiny" / "checkpoints" / "step-00000020" / "rank-00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    resume = f"checkpoint.resume={damaged.parent}"
    done = on(head, "submit", "run.yaml", "--to", "ray", "--follow", resume, "name=other", folder=workspace)
    assert done.returncode == 3
    assert "Traceback" not in done.stderr


@pytest.mark.whole_grid
def test_a_stopped_job_has_saved_and_continues_when_submitted_again(head: RayHead, workspace: Path) -> None:
    settings = ("train.steps=100000", "checkpoint.every_steps=0")
    job = on(head, "submit", "run.yaml", "--to", "ray", *settings, folder=workspace)
    assert job.returncode == 0, job.stderr
    run = workspace / "runs" / "tiny"
    this = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    wait_until(lambda: last_row(run) >= 10, this)
    this.kill()
    this.wait()
    again = on(head, "submit", "run.yaml", "--to", "ray", *settings, folder=workspace)
    assert again.returncode == 4 and f"job {job.stdout.strip()} of this run is RUNNING" in again.stderr
    stopped = on(head, "submit", "run.yaml", "--to", "ray", "--stop", folder=workspace)
    assert stopped.stdout == f"{job.stdout.strip()} STOPPED\n", stopped.stderr
    step = last_row(run)
    assert (status(run)["status"], status(run)["step"]) == ("preempted", step)
    more = on(head, "submit", "run.yaml", "--to", "ray", "--follow", f"train.steps={step + 3}", folder=workspace)
    assert more.returncode == 0 and f"from step {step}" in more.stderr, more.stderr
    assert last_row(run) == step + 3


def write_relative_pipeline(folder: Path) -> Path:
    """A pipeline whose paths are relative, and the folder of its result."""
    write_collection(folder, 20)
    read = [{"path": "raw/text", "name": "text"}, {"path": "raw/*.jsonl", "name": "rows"}]
    write_pipeline(folder, output_dir="out", read=read, chunk_bytes=20_000, run={"workers": 2})
    return folder / "out" / "corpus"


def test_a_pipeline_as_a_job_gives_what_the_command_gives(head: RayHead, tmp_path: Path) -> None:
    folder = tmp_path / "it's $(touch owned) [a]"
    folder.mkdir()
    result = write_relative_pipeline(folder)
    submitted = ("submit", "pipeline.yaml", "--to", "ray")
    done = on(head, *submitted, "--follow", folder=folder)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"corpus-\d{8}-\d{6}-[0-9a-f]{4}\n", done.stdout)
    assert "summary.json has the counts" in done.stderr.splitlines()[-1]
    said = on(head, *submitted, "--status", folder=folder)
    assert said.stdout == f"{done.stdout.strip()} SUCCEEDED exit code 0\n"
    found = tree_hash(result)
    shutil.rmtree(folder / "out")
    assert llmtrain("data", "run", "pipeline.yaml", folder=folder).returncode == 0
    assert tree_hash(result) == found
    assert list(tmp_path.rglob("owned")) == []


@pytest.mark.whole_grid
def test_a_pipeline_that_is_stopped_continues_when_submitted_again(head: RayHead, tmp_path: Path) -> None:
    result = write_relative_pipeline(tmp_path)
    long = "\n".join(source_texts(30))
    for number in range(400):
        (tmp_path / "raw" / "text" / f"long-{number}.txt").write_text(f"{number}\n{long}", "utf-8")
    # Half a minute of work and more, in many tasks.
    steps = "steps=[normalize, pii, {quality: {rules: [gopher, gopher_repetition, c4, fineweb]}}]"
    submitted = ("submit", "pipeline.yaml", "--to", "ray", "run.workers=1", steps)
    job = on(head, *submitted, folder=tmp_path)
    assert job.returncode == 0, job.stderr
    wait_until(lambda: len(list(result.glob("done/*"))) >= 3, head.nodes[0].process)  # type: ignore[arg-type]  # bytes
    again = on(head, *submitted, folder=tmp_path)
    assert again.returncode == 4 and f"job {job.stdout.strip()} of this run is RUNNING" in again.stderr
    stopped = on(head, *submitted, "--stop", folder=tmp_path)
    assert stopped.stdout == f"{job.stdout.strip()} STOPPED\n", stopped.stderr
    assert "What is done stays done" in on(head, *submitted, "--logs", folder=tmp_path).stdout
    assert not (result / "summary.json").exists() and not (result / "run.lock").exists()
    more = on(head, *submitted, "--follow", folder=tmp_path)
    assert more.returncode == 0 and "done before" in more.stderr, more.stderr
    assert (result / "summary.json").exists()


@pytest.mark.whole_grid
def test_what_is_wrong_with_a_pipeline_is_told_before_it_is_submitted(head: RayHead, tmp_path: Path) -> None:
    write_relative_pipeline(tmp_path)
    submitted = ("submit", "pipeline.yaml", "--to", "ray")
    wrong = on(head, *submitted, "read.0.path=gone", "steps=[normalise]", folder=tmp_path)
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert "read.0.path = gone (command line): no such file" in wrong.stderr
    assert "Did you mean steps.0.normalize?" in wrong.stderr
    with ray_head(num_cpus=2, is_open=True, is_outward=True) as other:
        refused = on(other, *submitted, folder=tmp_path)
        assert refused.returncode == 1 and "allow it with run.allow_open_cluster=true" in refused.stderr


@pytest.mark.whole_grid
def test_ray_job_submit_by_hand(head: RayHead, workspace: Path) -> None:
    """As docs/operations/ray.md says."""
    train = ["env", "-C", str(workspace), COMMAND, "train", "run.yaml", "launch.backend=ray"]
    line = [RAY, "job", "submit", "--address", head.dashboard, "--", *train]
    environ = {**ENVIRONMENT, **head.environ}
    done = subprocess.run(line, env=environ, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert last_row(workspace / "runs" / "tiny") == 20


@pytest.mark.whole_grid
def test_the_cluster_of_this_machine_is_found(head: RayHead, workspace: Path) -> None:
    """With its token: what finds the address must not let Ray read the environment before that is right."""
    found = {"RAY_ADDRESS": head.address}
    line = ("train", "run.yaml", "launch.backend=ray", "launch.ray_address=auto", "train.steps=10")
    done = on(head, *line, folder=workspace, **found)
    assert done.returncode == 0, done.stderr
    assert last_row(workspace / "runs" / "tiny") == 10


HOSTILE = ("it's $(touch owned)", 'a "quoted" `touch owned`', "né; touch owned &", "-rf $HOME")


@pytest.mark.whole_grid
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_values_arrive_as_they_were_written(head: RayHead, workspace: Path, name: str) -> None:
    folder = workspace / name
    folder.mkdir()
    shutil.copy(workspace / "run.yaml", folder / "run.yaml")
    paths = ("data.train.0.path=../data/train", "data.valid.0.path=../data/valid", "data.tokenizer=../tokenizer.model")
    output = f"output_dir={json.dumps(f'out {name}')}"
    shown = on(head, "submit", "./run.yaml", "--to", "ray", "--dry-run", output, *paths, folder=folder)
    assert shown.returncode == 0, shown.stderr
    asked = json.loads(shown.stdout.partition("\n---\n")[0])
    assert name not in asked["entrypoint"]
    if name == HOSTILE[0]:
        done = on(head, "submit", "./run.yaml", "--to", "ray", "--follow", output, *paths, folder=folder)
        assert done.returncode == 0, done.stderr
        assert last_row(folder / f"out {name}" / "tiny") == 20
    assert list(workspace.rglob("owned")) == []


@pytest.mark.whole_grid
def test_secrets_stay_where_they_are(workspace: Path) -> None:
    """Neither on any command line, nor in any file that is written, while a run goes on and after it."""
    long = ("train.steps=100000", "checkpoint.every_steps=20", "observe.wandb=offline")
    with ray_head(num_cpus=3, extra=CANARIES) as head:
        pattern = "launch.pass_environment=[PASSED_*]"
        job = on(head, "submit", "run.yaml", "--to", "ray", *long, pattern, folder=workspace, **CANARIES)
        assert job.returncode == 0, job.stderr
        run = workspace / "runs" / "tiny"
        wait_until(lambda: last_row(run) >= 30, head.nodes[0].process)  # type: ignore[arg-type]  # bytes, not read
        # Asked for in advance: of a process that has ended in between there is none.
        lines = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
        stopped = on(head, "submit", "run.yaml", "--to", "ray", "--stop", folder=workspace, **CANARIES)
        assert stopped.returncode == 0, stopped.stderr
        secrets = {**CANARIES, "RAY_AUTH_TOKEN": head.token}
        passed = secrets.pop("PASSED_ON")
        for secret in secrets.values():
            assert not [line for line in lines if secret in line]
        allowed = {head.folder / "token"}
        files = [path for folder in (workspace, head.folder) for path in folder.rglob("*") if path.is_file()]
        written = {path: path.read_bytes() for path in files if not path.is_symlink() and path not in allowed}
        assert any(path.suffix == ".wandb" for path in written)
        for name, secret in secrets.items():
            assert [path for path, content in written.items() if secret.encode() in content] == [], name
        # The search finds what is there: what was to be passed on is no secret, and Ray writes it down.
        assert any(passed.encode() in content for content in written.values())


@pytest.mark.whole_grid
def test_an_open_cluster_on_other_machines_is_refused(workspace: Path) -> None:
    with ray_head(num_cpus=2, is_open=True, is_outward=True) as head:
        assert answer_of(f"{head.dashboard}/api/jobs/") == 200
        refused = on(head, "submit", "run.yaml", "--to", "ray", folder=workspace)
        assert refused.returncode == 1 and "asks nobody for a token" in refused.stderr
        address = f"launch.ray_address={head.address}"
        refused = on(head, "train", "run.yaml", "launch.backend=ray", address, folder=workspace)
        assert refused.returncode == 1 and "launch.allow_open_cluster=true" in refused.stderr
        assert not (workspace / "runs").exists()
        allowed = ("launch.backend=ray", address, "launch.allow_open_cluster=true")
        done = on(head, "train", "run.yaml", *allowed, folder=workspace)
        assert done.returncode == 0, done.stderr


def test_a_ray_of_the_runs_own_refuses_strangers_and_other_machines(workspace: Path) -> None:
    line = [COMMAND, "train", "run.yaml", "launch.backend=ray", "train.steps=100000"]
    process = subprocess.Popen(line, cwd=workspace, env={**ENVIRONMENT, **CANARIES}, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: last_row(workspace / "runs" / "tiny") >= 3, process)  # type: ignore[arg-type]  # see above
        children = psutil.Process(process.pid).children(recursive=True)
        listening = {
            (connection.laddr.ip, connection.laddr.port)
            for child in children
            for connection in child.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        assert {ip for ip, _ in listening} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, outward_address()
        [head] = [child for child in children if child.name() == "gcs_server"]
        served = [connection.laddr.port for connection in head.net_connections("inet") if not connection.raddr]
        assert {ask_head(f"127.0.0.1:{port}", timeout_seconds=5) for port in served} >= {"refuses"}
        asked = [f"127.0.0.1:{port}" for _, port in listening]
        assert "answers" not in [ask_head(address, timeout_seconds=1) for address in asked]
        assert not [address for address in asked if answers_http(address)]
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def answers_http(address: str) -> bool:
    """Whether a server tells a stranger which jobs there are."""
    try:
        return answer_of(f"http://{address}/api/jobs/", timeout_seconds=2) == 200
    except (OSError, http.client.HTTPException):
        return False
