"""Batch scripts: what Slurm is asked for, and what bash does with the body, run with stand-ins for every command."""

import os
import signal
import stat
import subprocess
import sys
import time
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launch.on_slurm import batch_script
from launch.on_slurm.asked_job import BODY_MARK
from llmtrain.config.reading.load import load_config
from llmtrain.config.schema import RunConfig
from llmtrain.errors import ConfigError, LaunchError
from tests.architecture.source_tree import ROOT
from tests.support.run_files import write_good_run

RECORD = """#!/bin/bash
printf '%s\\0' "$@" > "$SANDBOX/arguments"
pwd > "$SANDBOX/folder"
"""
SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a run that passes every check."""
    write_good_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def loaded(*overrides: str) -> RunConfig:
    return load_config(Path("run.yaml"), overrides).config


def put_command(folder: Path, name: str, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, "utf-8")
    (folder / name).chmod(0o755)


def header(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def test_the_header_says_what_the_configuration_asks_for(folder: Path) -> None:
    asked = {
        "nodes": "2",
        "partition": "gpu,big",
        "account": "me",
        "qos": "high",
        "reservation": "r1",
        "constraint": "[rack1*2]",
        "time": "1-00:00:00",
        "memory": "480G",
        "exclusive": "true",
        "warn_seconds": "300",
    }
    config = loaded(
        *(
            f"launch.slurm.{key}='{value}'" if key == "constraint" else f"launch.slurm.{key}={value}"
            for key, value in asked.items()
        ),
        "launch.num_workers=8",
        "train.global_batch_size=32",
        "launch.cpus_per_worker=6",
        "launch.device=cuda",
    )
    script = batch_script.render(config, Path("run.yaml"), ["optim.lr=1e-4"])
    assert script.startswith("#!/bin/bash\n#SBATCH ")
    assert header(script) == [
        "--job-name=small",
        "--nodes=2",
        "--ntasks=8",
        "--ntasks-per-node=4",
        "--cpus-per-task=6",
        "--gpus-per-node=4",
        "--partition=gpu,big",
        "--account=me",
        "--qos=high",
        "--reservation=r1",
        '--constraint="[rack1*2]"',
        "--time=1-00:00:00",
        "--mem=480G",
        "--exclusive",
        "--signal=B:USR1@300",
        "--requeue",
        "--open-mode=append",
        f"--output={folder}/runs/small/logs/slurm-%j.log",
    ]


def test_what_is_not_set_is_left_to_the_site(folder: Path) -> None:
    options = [option.partition("=")[0] for option in header(batch_script.render(loaded(), Path("run.yaml"), []))]
    assert options == [
        "--job-name",
        "--nodes",
        "--ntasks",
        "--ntasks-per-node",
        "--cpus-per-task",
        "--signal",
        "--requeue",
        "--open-mode",
        "--output",
    ]


@pytest.mark.parametrize(("backend", "file"), [("local", 0), ("slurm", 0), ("ray", 1)])
def test_the_body_is_that_of_the_file_for_use_by_hand(folder: Path, backend: str, file: int) -> None:
    script = batch_script.render(loaded(f"launch.backend={backend}"), Path("run.yaml"), [])
    by_hand = (ROOT / "slurm" / ("train.sbatch", "train_on_ray.sbatch")[file]).read_text("utf-8")
    body = by_hand.partition(BODY_MARK)[2]
    assert len(body) > 500
    assert script.endswith(body)
    both = ("--signal=B:USR1@120", "--requeue", "--open-mode=append")
    assert set(both) <= set(header(script)) and set(both) <= set(header(by_hand))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "set -x" not in script.read_text("utf-8")


# What shells, sbatch and printf find special, and a command that leaves something behind.
PIECES = [
    "$(touch CANARY)",
    "`touch CANARY`",
    ";touch CANARY;",
    "\n#SBATCH --wrap=x\n",
    "'",
    '"',
    "\\",
    " ",
    "%j",
    "*",
    "~",
]
PIECES += [
    "-",
    "--",
    "#",
    "${HOME}",
    "!",
    "\r\n",
    "\t",
    "\x7f",
    "ä",
    "\u2028",
    "𝕏",
    "\udcff",
    "a",
    "7",
    "=",
    "|",
    "&",
    ">x",
    "$'",
]
hostile = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join)
hostile_name = hostile.filter(lambda text: text not in (".", ".."))
WRITTEN = [piece for piece in PIECES if not any(unicodedata.category(letter) in ("Cc", "Cs") for letter in piece)]
hostile_key = st.lists(st.sampled_from(WRITTEN), min_size=1, max_size=6).map("".join)
"""What a configuration takes: it refuses control characters, which a folder and a command line may have."""


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=hostile_name, config_name=hostile, overrides=st.lists(hostile, max_size=3), setup=hostile_key)
def test_hostile_values_arrive_byte_for_byte_and_run_nothing(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    config_name: str,
    overrides: list[str],
    setup: str,
) -> None:
    """The whole script, but for its header, with llmtrain as a stand-in that records what it gets."""
    sandbox = tmp_path_factory.mktemp("sandbox")
    folder, commands = sandbox / place, sandbox / f"bin {place.replace(':', '')}"
    folder.mkdir()
    put_command(commands, "llmtrain", RECORD)
    (folder / setup).write_text("export SETUP_RAN=1\n", "utf-8")
    write_good_run(sandbox)
    monkeypatch.setattr(sys, "executable", str(commands / "python"))
    config = load_config(sandbox / "run.yaml", ["output_dir=/plain"]).config
    config = config.with_keys({"launch.slurm.setup": setup})
    script = batch_script.render(config, Path(config_name), overrides, folder)
    script.encode()  # it can be printed and written
    count = len(header(batch_script.render(config, Path("x"), [], Path("/x"))))
    assert len(header(script)) == count
    before = {path: path.is_dir() for path in sandbox.rglob("*")}

    environment = {"PATH": "/usr/bin:/bin", "SANDBOX": str(sandbox), "HOME": str(sandbox)}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_JOB_NUM_NODES": "2"}
    done = subprocess.run(
        ["bash", "-c", script], cwd="/", env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    words = [os.fsdecode(word) for word in (sandbox / "arguments").read_bytes().split(b"\0")[:-1]]
    ours = ["launch.backend=slurm", "launch.num_workers=4", "launch.slurm.nodes=2"]
    assert words == ["train", "--", str(Path(config_name)), *overrides, *ours]
    assert os.fsdecode((sandbox / "folder").read_bytes()) == f"{folder}\n"
    after = {path: path.is_dir() for path in sandbox.rglob("*")}
    assert after == {**before, sandbox / "arguments": False, sandbox / "folder": False}


@pytest.mark.parametrize("name", ["a\nb", "a\\b", "a\x1bb"])
def test_paths_that_slurm_cannot_take_for_a_log_are_refused(folder: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"output_dir = .*Choose another folder"):
        batch_script.render(loaded(), Path("run.yaml"), [], Path("/") / name)


@pytest.mark.parametrize("backend", ["local", "slurm", "ray"])
def test_ranks_are_spread_evenly_or_refused(folder: Path, backend: str) -> None:
    keys = ("launch.num_workers=2", "launch.slurm.nodes=3", f"launch.backend={backend}")
    with pytest.raises(
        ConfigError, match=r"launch\.slurm\.nodes = 3.* must divide launch\.num_workers = 2\. Try 1 or 2"
    ):
        batch_script.render(loaded(*keys), Path("run.yaml"), [])


def test_a_log_may_lie_in_a_strange_folder(folder: Path) -> None:
    config = loaded().with_keys({"output_dir": "/a 'b' \"c\" #%j $(x)"})
    option = header(batch_script.render(config, Path("run.yaml"), []))[-1]
    assert option == '--output="/a \'b\' \\"c\\" #%%j $(x)/small/logs/slurm-%j.log"'


def outcome(
    folder: Path, body: str, run: str, state: str = "RUNNING", tell: Sequence[signal.Signals] = ()
) -> tuple[int, bool]:
    """The exit code of a body whose launcher does `run`, and whether the job was requeued; `tell` is sent to bash."""
    commands = folder / "bin"
    put_command(commands, "llmtrain", f"#!{sys.executable} -IS\nimport os, signal, sys, time\n{run}\n")
    put_command(commands, "squeue", f"#!/bin/bash\necho {state}\n")
    put_command(commands, "scontrol", '#!/bin/bash\necho "$@" > requeued\n')
    environment = {"PATH": f"{commands}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"}
    environment["SLURM_JOB_NUM_NODES"] = "1"
    process = subprocess.Popen(["bash", "-c", f"set -- run.yaml\n{body}"], cwd=folder, env=environment)
    for number in tell:
        deadline = time.monotonic() + 60
        while not (folder / "listening").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
    code = process.wait(timeout=60)
    requeued = folder / "requeued"
    if requeued.exists():
        assert requeued.read_text() == "requeue 7\n"
    return code, requeued.exists()


def train_body() -> str:
    return (ROOT / "slurm" / "train.sbatch").read_text("utf-8").partition(BODY_MARK)[2]


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 93, 143])
def test_other_codes_are_passed_on_and_not_requeued(tmp_path: Path, code: int) -> None:
    assert outcome(tmp_path, train_body(), f"sys.exit({code})") == (code, False)


def test_what_was_saved_is_requeued_unless_the_job_is_cancelled(tmp_path: Path) -> None:
    assert outcome(tmp_path, train_body(), "sys.exit(75)", state="COMPLETING") == (75, False)
    assert outcome(tmp_path, train_body(), "sys.exit(75)") == (75, True)


def test_a_body_that_does_not_requeue_is_caught(tmp_path: Path) -> None:
    broken = train_body().replace('scontrol requeue "$SLURM_JOB_ID"', "true")
    assert broken != train_body()
    assert outcome(tmp_path, broken, "sys.exit(75)") == (75, False)


LISTENER = """
def end(*_):
    open("told", "a").write("told\\n")
    time.sleep(0.2)
    sys.exit(75)
signal.signal(signal.SIGUSR1, end)
open("listening", "w").write(str(os.getpid()))
while True:
    time.sleep(0.05)
"""


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signals_reach_the_launcher_and_its_code_is_waited_for(tmp_path: Path, number: signal.Signals) -> None:
    assert outcome(tmp_path, train_body(), LISTENER, tell=[number]) == (75, True)
    assert (tmp_path / "told").read_text() == "told\n"


@pytest.mark.parametrize("broken", ["trap tell USR1 TERM", 'while kill -0 "$launcher" 2>/dev/null; do'])
def test_a_body_that_does_not_listen_or_wait_is_caught(tmp_path: Path, broken: str) -> None:
    body = train_body().replace(broken, "while false; do" if broken.startswith("while") else "")
    assert body != train_body()
    assert outcome(tmp_path, body, LISTENER, tell=[signal.SIGUSR1]) != (75, True)
    if not (tmp_path / "told").exists():  # nobody has told the stand-in to stop
        os.kill(int((tmp_path / "listening").read_text()), signal.SIGKILL)


def test_a_signal_before_the_launcher_listens_is_not_lost(tmp_path: Path) -> None:
    """It would end a process that has no handler yet."""
    late = f'open("listening", "w").write(""); time.sleep(0.5)\n{LISTENER}'
    assert outcome(tmp_path, train_body(), late, tell=[signal.SIGUSR1]) == (75, True)


def test_the_script_is_private_and_its_job_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_command(folder / "bin", "sbatch", '#!/bin/bash\nprintf "%s\\n" "$@" > asked; echo "42;cluster"\n')
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")
    config = loaded("optim.lr=2e-4")
    assert batch_script.submit(config, Path("run.yaml"), ["optim.lr=2e-4"]) == "42"
    script = folder / "runs" / "small" / "job.sbatch"
    assert (folder / "asked").read_text().splitlines() == ["--parsable", str(script)]
    assert stat.S_IMODE(script.stat().st_mode) == 0o600
    assert script.read_text("utf-8") == batch_script.render(config, Path("run.yaml"), ["optim.lr=2e-4"])
    assert (script.parent / "logs").is_dir()
    assert batch_script.submit(config, Path("run.yaml"), []) == "42"  # again, over the last one


def test_what_sbatch_refuses_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_command(folder / "bin", "sbatch", "#!/bin/bash\necho 'sbatch: error: invalid partition' >&2; exit 1\n")
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")
    with pytest.raises(LaunchError, match="refused the job:\nsbatch: error: invalid partition"):
        batch_script.submit(loaded(), Path("run.yaml"), [])
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(LaunchError, match="sbatch: cannot be started"):
        batch_script.submit(loaded(), Path("run.yaml"), [])
    with pytest.raises(ConfigError, match=r"launch\.slurm\.setup = no\.sh: there is no such file"):
        batch_script.submit(loaded("launch.slurm.setup=no.sh"), Path("run.yaml"), [])


def test_credentials_do_not_get_into_a_script(folder: Path) -> None:
    overrides = ["data.train.0.path=https://user:canary@host/d?sig=canary", "train.steps=5"]
    with pytest.raises(ConfigError) as refused:
        batch_script.render(loaded(*overrides), Path("run.yaml"), overrides)
    assert "data.train.0.path = https://host/d (command line)" in str(refused.value)
    assert "canary" not in str(refused.value)
