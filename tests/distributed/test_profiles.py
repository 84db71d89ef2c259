"""`observe.profile` with real ranks in every engine: the wanted steps on the wanted ranks, and the same losses."""

import gzip
import json
from pathlib import Path

import pytest

from llmtrain.runs.metrics_file import read_rows
from tests.support.command import llmtrain

ENGINES = {
    "torch": (),
    "megatron": ("engine.name=megatron", "parallel.tensor=2"),
    "deepspeed": ("engine.name=deepspeed", "engine.zero_stage=3"),
}
STEPS = ("train.steps=6", "optim.warmup_steps=2", "evaluate.every_steps=0")


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_rows(run / "metrics.jsonl")]


IN_SHORT = ("megatron",)
CASES = [name if name in IN_SHORT else pytest.param(name, marks=pytest.mark.whole_grid) for name in ENGINES]


@pytest.mark.whole_grid
@pytest.mark.parametrize("engine", CASES)
def test_steps_are_traced_and_nothing_else_changes(workspace: Path, engine: str) -> None:
    profile = "observe.profile={steps: [3, 4], ranks: [1]}"
    for name, more in (("plain", ()), ("traced", (profile,))):
        done = llmtrain("train", "run.yaml", f"name={name}", *STEPS, *ENGINES[engine], *more, folder=workspace)
        assert done.returncode == 0, done.stderr
    run = workspace / "runs" / "traced"
    assert losses(run) == losses(workspace / "runs" / "plain")
    stem = "rank-00001-steps-00000003-00000004"
    assert sorted(path.name for path in (run / "profile").iterdir()) == [f"{stem}.json.gz", f"{stem}.txt"]
    events = json.loads(gzip.decompress((run / "profile" / f"{stem}.json.gz").read_bytes()))["traceEvents"]
    names = {event["name"] for event in events if event.get("cat") == "user_annotation"}
    parts = {f"{part} of step {step}" for part in ("data", "work") for step in (3, 4)}
    assert parts <= names and not names & {"work of step 2", "work of step 5"}
    operations = {event["name"] for event in events if event.get("cat") == "cpu_op"}
    assert {"aten::mm", "aten::_fused_adamw_"} <= operations
    assert f"traced steps 3 to 4: runs/traced/profile/{stem}.json.gz" in (run / "logs" / "rank-00001.log").read_text()
    assert not (workspace / "runs" / "plain" / "profile").exists()
