"""`llmtrain parity` as a user runs it."""

import json
from pathlib import Path

from tests.support.command import llmtrain

CONFIG = Path(__file__).parents[2] / "configs" / "runs" / "quickstart.yaml"


def test_layouts_are_compared_and_reported(tmp_path: Path) -> None:
    done = llmtrain(
        "parity", CONFIG, "--layouts", "torch:dp2,megatron:tp2+sp+zero1", "--steps", "2", "--json", folder=tmp_path
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["layout"] for row in rows] == ["torch:dp2", "megatron:tp2+sp+zero1"]
    assert all(row["problems"] == [] and row["loss"] < 1e-5 for row in rows)


def test_an_unknown_layout_ends_with_2(tmp_path: Path) -> None:
    done = llmtrain("parity", CONFIG, "--layouts", "megatron:tp3", folder=tmp_path)
    assert done.returncode == 2
    assert "parallel.tensor" in done.stderr
    assert "Traceback" not in done.stderr
