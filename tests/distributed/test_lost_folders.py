"""A run whose folder another process has taken over stops, on all ranks, and writes nothing more."""

import json
from pathlib import Path

import pytest

from tests.distributed.test_local_launcher import spoiled
from tests.support.run_files import contents


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_run_that_was_taken_over_stops_and_writes_nothing_more(workspace: Path, num_workers: int) -> None:
    """It was at step 12; the run would save and evaluate at 20, and could be started again three times."""
    options = [f"launch.num_workers={num_workers}", "launch.max_stalled_attempts=3", "checkpoint.async_save=false"]
    lost = spoiled("losing_the_folder", "train", "run.yaml", *options, folder=workspace)
    assert lost.returncode == 4, lost.stderr
    assert "taken over by process 4242 on elsewhere" in lost.stderr
    assert "Traceback" not in lost.stderr and "starting again" not in lost.stderr
    found = json.loads((workspace / "taken_over.json").read_text("utf-8"))
    assert {"metrics.jsonl", "status.json", "audit.jsonl", "checkpoints/step-00000010/manifest.json"} <= set(found)
    assert contents(workspace / "runs" / "tiny") == found
    if num_workers > 1:
        assert "rank 0 has lost the run folder" in (workspace / "runs/tiny/logs/rank-00001.log").read_text("utf-8")
