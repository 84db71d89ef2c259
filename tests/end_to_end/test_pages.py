"""The commands of README.md, docs/quickstart.md and the pages about operations, run as they are written.

`make test` runs what takes seconds, with README's `my-run.yaml` made small; `make test-all` runs the rest with the file
as it is but for its number of steps, and goes through the quickstart. A command that stands in no list here fails.
"""

import os
import re
import shlex
import subprocess
import sysconfig
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from launch.on_slurm import batch_script
from llmtrain.preflight.storage import load_run
from tests.architecture.test_docs import README, ROOT, blocks, parse_llmtrain
from tests.support.command import COMMAND, ENVIRONMENT
from tests.support.ray_cluster import ray_head
from tests.support.slurm import NoSlurmError, running_slurm

QUICKSTART = ROOT / "docs" / "quickstart.md"
PAGES = (README, QUICKSTART, ROOT / "docs" / "operations.md", *sorted((ROOT / "docs" / "operations").glob("*.md")))
TIMEOUT_SECONDS = 3600

SMALL = {"steps: 1000": "steps: 4", "seq_len: 256": "seq_len: 32", "every_steps: 100}": "every_steps: 2, steps: 1}"}
SMALL |= {"every_steps: 200": "every_steps: 2"}
SHORT = {"steps: 1000": "steps: 20"}
"""What of README's my-run.yaml is changed: a run of 1000 steps takes half an hour."""

JOB_OF_8 = "launch.num_workers=8 launch.slurm.nodes=2 train.micro_batch_size=2"

MANY_RANKS = "llmtrain train my-run.yaml --dry-run --ranks 1024 train.global_batch_size=8192"

MAIN_JOB = (
    "llmtrain data tokenizer my-text my-tokenizer.model --vocab-size 8000",
    "llmtrain data shards my-text my-data --tokenizer my-tokenizer.model --valid-fraction 0.1",
    "llmtrain train my-run.yaml",
    "llmtrain report runs/my-run",
    "llmtrain export runs/my-run my-model --to hf",
    "llmtrain generate my-model --prompt 'Once upon'",
)
LOOKING = (
    "llmtrain status runs/my-run",
    "llmtrain status runs --json",
    "llmtrain status runs --watch",
    "llmtrain logs runs/my-run -f",
    "llmtrain logs -f runs/my-run",
    "llmtrain logs runs/my-run --rank 0",
    "llmtrain train my-run.yaml optim.lr=5e-4 --dry-run",
    MANY_RANKS,
    "llmtrain checkpoint verify runs/my-run",
    "llmtrain import my-model my-weights",
    f"llmtrain submit my-run.yaml --to slurm {JOB_OF_8} --dry-run",
)
LONGER = (
    "llmtrain doctor",
    "llmtrain doctor --json",
    "llmtrain train my-run.yaml engine.name=megatron parallel.tensor=2 launch.num_workers=2",
    "llmtrain parity my-run.yaml --layouts megatron:tp2+sp+zero1,deepspeed:dp2+zero3",
    "llmtrain train my-run.yaml launch.backend=ray launch.num_workers=2",
    "llmtrain train my-run.yaml observe.wandb=online",
    "llmtrain drill my-run.yaml launch.num_workers=2",
)
"""What needs minutes, or processes of its own. In `make test` the configurations are checked."""

ON_SLURM = (
    f"llmtrain submit my-run.yaml --to slurm {JOB_OF_8}",
    "sbatch slurm/train.sbatch my-run.yaml optim.lr=1e-4",
)
ON_RAY = (
    "ray get-auth-token --generate > /dev/null",
    "chmod 600 ~/.ray/auth_token",
    "llmtrain train my-run.yaml launch.backend=ray launch.ray_address=HEAD:6379 launch.num_workers=2",
    "llmtrain submit my-run.yaml --to ray launch.num_workers=8 train.micro_batch_size=2 --follow",
    "llmtrain submit my-run.yaml --to ray",
    "llmtrain submit my-run.yaml --to ray --follow",
    "llmtrain submit my-run.yaml --to ray --status",
    "llmtrain submit my-run.yaml --to ray --stop",
    "export RAY_AUTH_MODE=token",
    'ray job submit --address http://127.0.0.1:8265 -- env -C "$PWD" llmtrain train my-run.yaml launch.backend=ray',
)
NOT_RUN = {
    "make test": "it runs this test",
    "RAY_AUTH_MODE=token ray start --head --dashboard-host=127.0.0.1": "takes ports that others may have: the tests "
    "start a head on ports of its own (tests/support/ray_cluster.py)",
    "RAY_AUTH_MODE=token ray start --address=HEAD:6379": "is for another machine: see the line before",
    "wandb login": "asks a person for a key",
    "wandb sync runs/my-run/wandb/offline-run-*": "needs a server: tests/end_to_end/test_wandb.py has one",
}
BEHIND_QUICKSTART = (
    "make quickstart",
    ". .venv/bin/activate",
    "llmtrain generate quickstart/runs/quickstart --prompt 'import ' --temperature 0.5",
    "llmtrain status quickstart/runs",
    "llmtrain data show quickstart/data --seq-len 256",
    "llmtrain checkpoint list quickstart/runs/quickstart",
    "llmtrain train configs/runs/quickstart.yaml --print-config",
    "llmtrain train configs/runs/quickstart.yaml train.steps=600",
    "llmtrain train configs/runs/quickstart.yaml name=small-lr optim.lr=1e-3",
    "llmtrain report quickstart/runs/quickstart quickstart/runs/small-lr --out comparison.html",
)
LISTED = {*MAIN_JOB, *LOOKING, *LONGER, *ON_SLURM, *ON_RAY, *NOT_RUN, *BEHIND_QUICKSTART}


def command_lines(text: str) -> Iterator[str]:
    """The commands in a page's sh blocks, as they are written, without their comments."""
    for block in blocks(text, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            if command := re.sub(r"(^|\s+)#.*", "", line).strip():
                yield command


def readme_run(changes: Mapping[str, str]) -> str:
    """README's my-run.yaml with texts replaced."""
    (text,) = blocks(README.read_text("utf-8"), "yaml")
    for before, after in changes.items():
        assert before in text
        text = text.replace(before, after)
    return text


def clone(folder: Path, changes: Mapping[str, str]) -> Path:
    """What a fresh clone has and the commands use, README's own file, and a folder of text."""
    for name in ("configs", "slurm", "Makefile", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "my-run.yaml").write_text(readme_run(changes), "utf-8")
    (folder / "my-text").mkdir()
    for file in Path(sysconfig.get_path("stdlib")).glob("[a-e]*.py"):
        (folder / "my-text" / file.name).write_bytes(file.read_bytes())
    (folder / "home").mkdir()
    return folder


def run(line: str, folder: Path, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a line as a shell does whose PATH has the command, and whose home is empty. Fails where the line does."""
    # Whoever asks for W&B's server finds nobody there.
    environ = {**ENVIRONMENT, "HOME": str(folder / "home"), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    environ |= environment or {}
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env={**environ, "PATH": f"{Path(COMMAND).parent}{os.pathsep}{environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{line}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def planned(line: str) -> str:
    """Check a run's command up to where something is started, as `--dry-run` does; for a job of Slurm, its script."""
    parameters = parse_llmtrain(shlex.split(line)[1:])
    path, overrides = parameters["config"], list(parameters["overrides"] or ())
    to_ray = ["launch.backend=ray"] if parameters.get("to") == "ray" else []
    config = load_run(path, [*overrides, *to_ray]).config
    return batch_script.render(config, path, overrides) if parameters.get("to") == "slurm" else config.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_the_page_is_known_here(page: Path) -> None:
    assert [line for line in command_lines(page.read_text("utf-8")) if line not in LISTED] == []


def test_no_command_is_listed_here_that_no_page_has() -> None:
    assert {line for page in PAGES for line in command_lines(page.read_text("utf-8"))} == LISTED


def test_commands_are_found_as_they_are_written() -> None:
    text = "```sh\nmake x   # why\n# only a comment\nllmtrain data \\\n  show 'a b'\n```\n```yaml\na: b\n```"
    assert list(command_lines(text)) == ["make x", "llmtrain data    show 'a b'"]


def test_the_main_job_and_what_looks_at_it_run_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = clone(tmp_path, SMALL)
    said = {line: run(line, folder).stdout for line in (*MAIN_JOB, *LOOKING)}
    assert "done at step 4/4" in said["llmtrain logs runs/my-run --rank 0"]
    assert said[MANY_RANKS].count("1,024 = ") == 1
    monkeypatch.chdir(folder)
    verbs = [line.split()[1] for line in (*LONGER, *ON_SLURM, *ON_RAY) if "my-run.yaml" in line and line[0] == "l"]
    assert set(verbs) == {"train", "parity", "drill", "submit"}
    for line in (*LONGER, *ON_SLURM, *ON_RAY):
        if line.startswith("llmtrain") and "my-run.yaml" in line:
            assert planned(line.replace("HEAD", "10.0.0.1"))


@pytest.mark.whole_grid
@pytest.mark.timeout(TIMEOUT_SECONDS)
def test_what_takes_longer_runs_as_written(tmp_path: Path) -> None:
    folder = clone(tmp_path, SHORT)
    for line in MAIN_JOB[:2]:
        run(line, folder)
    for number, line in enumerate(LONGER):
        run(line, folder)
        if (folder / "runs").exists():  # the next one trains too, and has nothing to continue
            (folder / "runs").rename(folder / f"runs-{number}")
    for line in (*MAIN_JOB[2:], *LOOKING):
        run(line, folder)


@pytest.mark.whole_grid
@pytest.mark.timeout(TIMEOUT_SECONDS)
def test_jobs_of_slurm_run_as_written(tmp_path: Path) -> None:
    folder = clone(tmp_path, SHORT)
    for line in MAIN_JOB[:2]:
        run(line, folder)
    try:
        with running_slurm() as slurm:
            for line in ON_SLURM:
                job = run(line, folder, slurm.environment).stdout.split()[-1]
                assert slurm.wait_for_end(job)["ExitCode"] == "0:0"
                (folder / "runs").rename(folder / f"runs-{job}")
    except NoSlurmError as error:
        pytest.skip(str(error))


@pytest.mark.whole_grid
@pytest.mark.timeout(TIMEOUT_SECONDS)
def test_jobs_of_ray_run_as_written(tmp_path: Path) -> None:
    folder = clone(tmp_path, SHORT)
    for line in MAIN_JOB[:2]:
        run(line, folder)
    # Ray is started where the command is on PATH, as in a shell that has sourced the environment's `activate`.
    path = f"{Path(COMMAND).parent}{os.pathsep}{os.environ['PATH']}"
    with ray_head(num_cpus=10, extra={"PATH": path}) as head:
        own = {name: value for name, value in head.environ.items() if name.startswith("RAY_")}
        own |= {"RAY_API_SERVER_ADDRESS": head.dashboard}
        for written in ON_RAY:
            line = written.replace("HEAD:6379", head.address).replace("http://127.0.0.1:8265", head.dashboard)
            # The token's own commands write into the home; the test's cluster has another one.
            run(line, folder, {} if line.startswith(("ray get-auth-token", "chmod")) else own)
            while (
                "submit" in line
                and " RUNNING" in run("llmtrain submit my-run.yaml --to ray --status", folder, own).stdout
            ):
                time.sleep(1)


@pytest.mark.whole_grid
@pytest.mark.timeout(TIMEOUT_SECONDS)
def test_the_quickstart_runs_as_written(tmp_path: Path) -> None:
    """All lines by one shell, which the second of them changes; then the page's Python."""
    folder = clone(tmp_path, {})
    venv = folder / ".venv"
    venv.mkdir()
    (venv / "bin").symlink_to(Path(COMMAND).parent)
    (venv / ".installed").touch()
    run("\n".join(("set -e", *BEHIND_QUICKSTART)), folder)
    assert (folder / "comparison.html").stat().st_size > 10_000
    (program,) = blocks(QUICKSTART.read_text("utf-8"), "python")
    (folder / "program.py").write_text(program, "utf-8")
    assert run("python program.py", folder).stdout.startswith("def main(")
