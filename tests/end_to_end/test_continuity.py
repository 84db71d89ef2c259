"""A run that would go on with something else than it was trained with is stopped before anything starts."""

import json
import re
import subprocess
import sys
from pathlib import Path

from tests.support.command import ENVIRONMENT, TIMEOUT_SECONDS, llmtrain

WATCHED = """
import sys

events = []
sys.addaudithook(lambda event, arguments: events.append(event))
from llmtrain import cli

try:
    cli.main(sys.argv[1:])
finally:
    processes = sum(event in ("os.fork", "os.posix_spawn", "os.exec", "subprocess.Popen") for event in events)
    print("processes:", processes, "torch:", "torch" in sys.modules)
"""


def watched(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The command; the last line of its output says what processes it began, and whether PyTorch was needed."""
    line = [sys.executable, "-c", WATCHED, *arguments]
    return subprocess.run(
        line, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
    )


def content(folder: Path) -> dict[str, tuple[int, int]]:
    """Time and size of everything below a folder."""
    return {
        str(path): (path.lstat().st_mtime_ns, path.lstat().st_size) for path in (folder, *sorted(folder.rglob("*")))
    }


def test_changed_settings_are_refused_with_a_diff_before_anything_starts(workspace: Path) -> None:
    trained = ("train", "run.yaml", "train.steps=6", "launch.num_workers=2")
    first = watched(*trained, folder=workspace)
    assert first.returncode == 0, first.stderr
    assert re.fullmatch(r"processes: [1-9]\d* torch: True", first.stdout.splitlines()[-1])

    (workspace / "changed.yaml").write_text("base: run.yaml\nseed: 7\nmodel:\n  dropout: 0.2\n  num_layers: 3\n")
    before = content(workspace)
    changes = ("train", "changed.yaml", "train.steps=8", "launch.num_workers=2", "data.seq_len=32")
    refused = watched(*changes, "checkpoint.allow_change=[model, data.seq_len]", folder=workspace)
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
    checkpoint = "runs/tiny/checkpoints/step-00000006"
    assert refused.stderr.splitlines() == [
        (
            f"error: model.num_layers = 3 (changed.yaml:5): the checkpoint {checkpoint} has 2. Set it back. "
            "The model's shape can never be allowed to change: that is a new run, under another name and with "
            "checkpoint.resume=auto."
        ),
        (
            f"error: seed = 7 (changed.yaml:2): the checkpoint {checkpoint} has 1234. "
            "Set it back, choose another name, or allow it with checkpoint.allow_change=[model, data.seq_len, seed]."
        ),
        "2 problems in changed.yaml; nothing was started.",
    ]
    assert refused.stdout.splitlines() == ["processes: 0 torch: False"]
    assert content(workspace) == before

    allowed = ("seed=7", "train.global_batch_size=32", "checkpoint.allow_change=[seed]")
    done = llmtrain("train", "run.yaml", "train.steps=8", *allowed, folder=workspace)
    assert done.returncode == 0, done.stderr
    assert f"changed since {checkpoint}: seed 1234 -> 7, train.global_batch_size 16 -> 32" in done.stderr
    assert "from step 6 to step 8" in done.stderr
    rows = [json.loads(line) for line in (workspace / "runs/tiny/audit.jsonl").read_text("utf-8").splitlines()]
    assert [(row["event"], row["key"], row["was"], row["now"]) for row in rows if row["event"] == "changed"] == [
        ("changed", "seed", 1234, 7)
    ]
    state = json.loads((workspace / "runs/tiny/checkpoints/step-00000008/state.json").read_text("utf-8"))
    assert state["train"]["samples"] == 6 * 16 + 2 * 32
