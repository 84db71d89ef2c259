"""Commands that are told to stop, at whatever they are doing: quietly, with 143, nothing left running or written."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from llmtrain.checks.drill.faults import FAULTS
from tests.distributed.conftest import write_workspace
from tests.support.blocked_command import BLOCKED
from tests.support.command import COMMAND, ENVIRONMENT, TIMEOUT_SECONDS, llmtrain, wait_until
from tests.support.hf_folders import write_llama

ROOT = Path(__file__).parents[2]

EITHER = pytest.mark.parametrize(
    "number",
    [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.whole_grid)],
    ids=lambda number: number.name,
)

BLOCKED_COMMANDS = {
    "import:typer": ("status", "runs/tiny"),
    "import:rich": ("--help",),
    "data_pipelines.inspection:verify_dataset": ("data", "verify", "data/train"),
    "data_pipelines.indexing:_index_shard": ("data", "index", "unindexed", "--tokenizer", "hf/tokenizer.json"),
    "llmtrain.data.tokenizer:HuggingFaceTokenizer.encode_batch": (
        *("data", "shards", "text", "out", "--tokenizer", "hf/tokenizer.json"),
    ),
    "llmtrain.preflight.storage:check_storage": ("train", "run.yaml"),
    "llmtrain.interop.hf_export:_prove": ("export", "hf-weights", "exported", "--to", "hf"),
    "llmtrain.checkpoint.writer:publish": ("import", "hf", "imported"),
    "llmtrain.infer.generate:iter_tokens": ("generate", "hf-weights", "--prompt", "x"),
    "llmtrain.checkpoint.reader:checkpoint_problems": ("checkpoint", "verify", "hf-weights"),
    "llmtrain.report.page:render": ("report", "runs/tiny"),
    "llmtrain.report.run_view:look": ("status", "runs/tiny", "--watch"),
    "llmtrain.runs.rank_logs:Follower.new_lines": ("logs", "runs/tiny", "-f"),
    "launch.on_slurm.batch_script:submit": ("submit", "run.yaml", "--to", "slurm"),
    "llmtrain.checks.drill.single_faults:drill_config": ("drill", "run.yaml"),
    "llmtrain.checks.parity.compare:compare_layouts": ("parity", "run.yaml"),
    "llmtrain.checks.doctor.examination:machine_findings": ("doctor",),
}
"""Where a command is when it is told to stop: in the middle of what takes time, or not even started."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands take."""
    folder = write_workspace(tmp_path_factory.mktemp("interrupted"))
    write_llama(folder / "hf")
    assert llmtrain("import", "hf", "hf-weights", folder=folder).returncode == 0
    done = llmtrain("train", "run.yaml", "train.steps=2", "launch.num_workers=1", folder=folder)
    assert done.returncode == 0, done.stderr
    (folder / "unindexed").mkdir()
    for tar in (folder / "data" / "train").glob("*.tar"):
        (folder / "unindexed" / tar.name).write_bytes(tar.read_bytes())
    (folder / "text").mkdir()
    for number in range(40):
        (folder / "text" / f"{number}.txt").write_text(f"some words, and the number {number}\n" * 20, "utf-8")
    return folder


def start(folder: Path, *line: str) -> subprocess.Popen[str]:
    """In a session of its own, as from a terminal: Ctrl-C there tells all of its processes."""
    environ = {**ENVIRONMENT, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    pipe = subprocess.PIPE
    return subprocess.Popen(line, cwd=folder, env=environ, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def lines_of(process: subprocess.Popen[str]) -> Iterator[str]:
    """What a command writes to stderr, as it comes."""
    assert process.stderr
    return iter(process.stderr.readline, "")


def interrupt(process: subprocess.Popen[str], number: signal.Signals) -> str:
    """Tell a command to stop, as a keyboard or a scheduler does, and wait for the end of all of its processes."""
    children = psutil.Process(process.pid).children(recursive=True)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    _, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    # What has been killed may take a moment; the pipes that have closed say that hardly anything is left.
    assert psutil.wait_procs(children, timeout=TIMEOUT_SECONDS)[1] == []
    return errors


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.name.startswith("report")}


def await_line(process: subprocess.Popen[str], text: str) -> None:
    """Wait until a command writes a line with that to stderr."""
    said = []
    for line in lines_of(process):
        said.append(line)
        if text in line:
            return
    raise AssertionError(f"{text!r} never came: {''.join(said)}")


def signals() -> Iterator[object]:
    """Each place with one signal, and with the other in the whole grid."""
    for turn, place in enumerate(BLOCKED_COMMANDS):
        for number in (signal.SIGINT, signal.SIGTERM):
            marks = () if (number == signal.SIGINT) == (turn % 2 == 0) else pytest.mark.whole_grid
            yield pytest.param(place, number, id=f"{place}-{number.name}", marks=marks)


@pytest.mark.parametrize(("place", "number"), signals())
def test_told_to_stop_a_command_ends_quietly_and_leaves_nothing(
    folder: Path, place: str, number: signal.Signals
) -> None:
    before = files(folder)
    process = start(folder, sys.executable, "-m", "tests.support.blocked_command", place, *BLOCKED_COMMANDS[place])
    await_line(process, BLOCKED)
    errors = interrupt(process, number)
    assert process.returncode == 143 and errors.splitlines()[-1] == "interrupted"
    assert "Traceback" not in errors
    assert files(folder) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_tokenizer_in_training_ends_at_once(folder: Path, number: signal.Signals) -> None:
    """Python hears of a signal when native code returns, hours later; nothing is written before."""
    before = files(folder)
    place = "native:data_pipelines.tokenizer:sentencepiece.SentencePieceTrainer.train"
    line = ("data", "tokenizer", "text", "trained.model", "--vocab-size", "300")
    process = start(folder, sys.executable, "-m", "tests.support.blocked_command", place, *line)
    await_line(process, BLOCKED)
    assert interrupt(process, number) == "" and process.returncode == -number
    assert files(folder) == before


def test_a_signal_that_is_ignored_from_outside_stays_so(folder: Path) -> None:
    """`nohup llmtrain ...` goes on when the terminal is closed."""
    line = ("llmtrain.report.page:render", "report", "runs/tiny")
    process = start(folder, "nohup", sys.executable, "-m", "tests.support.blocked_command", *line)
    await_line(process, BLOCKED)
    os.kill(process.pid, signal.SIGHUP)
    assert interrupt(process, signal.SIGTERM) == "interrupted\n"


@EITHER
def test_a_doctor_leaves_no_probe_behind(folder: Path, number: signal.Signals) -> None:
    process = start(folder, COMMAND, "doctor")
    await_line(process, "s  devices")  # engines are still at work
    assert interrupt(process, number).splitlines()[-1] == "interrupted"
    assert process.returncode == 143


@EITHER
@pytest.mark.parametrize("ranks_begin", [False, True], ids=["imports", "ranks"])
def test_parity_leaves_no_rank_behind(folder: Path, number: signal.Signals, ranks_begin: bool) -> None:
    layouts = "torch:dp2,megatron:tp2,megatron:pp2,deepspeed:dp2+zero1,deepspeed:dp2+zero2,deepspeed:dp2+zero3"
    process = start(folder, COMMAND, "parity", "run.yaml", "--layouts", layouts, "--json")
    await_line(process, "comparing 6 layouts")
    if ranks_begin:
        assert process.stdout and process.stdout.readline().startswith('{"layout": "torch:dp2"')
    assert interrupt(process, number) == "interrupted\n" and process.returncode == 143


@EITHER
def test_a_drill_ends_the_fault_in_progress_and_says_what_was_tried(folder: Path, number: signal.Signals) -> None:
    run = ("run.yaml", "launch.max_stalled_attempts=3", "launch.num_workers=1")
    process = start(folder, COMMAND, "drill", *run, "--only", "rank", "--json")
    faults = len([fault for fault in FAULTS if "rank" in fault.name and fault.least_ranks == 1])
    assert process.stdout and '"fault": "rank killed in a step"' in process.stdout.readline()
    drill = folder / "runs" / "tiny-drill"
    wait_until((drill / "rank-killed-while-a-checkpoint-is-written" / "injected").exists, process)
    said = interrupt(process, number).splitlines()[-1]
    assert process.returncode == 143
    assert said == (
        "told to stop in 'rank killed while a checkpoint is written', which does not count. "
        f"Tried: 1 of {faults} faults, 1 as they must, 0 not"
    )


def test_a_drill_that_is_killed_takes_its_ranks_along(folder: Path) -> None:
    run = ("run.yaml", "name=killed", "launch.num_workers=1", "launch.max_stalled_attempts=3")
    process = start(folder, COMMAND, "drill", *run, "--only", "SIGSTOP")
    wait_until((folder / "runs" / "killed-drill" / "rank-stopped--SIGSTOP-" / "injected").exists, process)
    interrupt(process, signal.SIGKILL)
