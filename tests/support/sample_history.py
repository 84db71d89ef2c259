"""Which samples a run has trained on in each step of the history that counts, as its ranks have written it down."""

import json
from collections import defaultdict
from datetime import datetime
from pathlib import Path

from llmtrain.runs.audit import STARTED, iter_events

FOLDER = str(Path(__file__).with_name("sample_log"))


def recording(log: Path) -> dict[str, str]:
    """The environment in which ranks of the torch engine write their samples into a folder, which is made."""
    log.mkdir()
    return {"PYTHONPATH": FOLDER, "SAMPLE_LOG": str(log)}


def samples_that_count(log: Path, run: Path) -> dict[int, list[int]]:
    """All ranks' samples of each step, sorted, of the last attempt that has made it; repeated where two ranks had one.

    An attempt's ranks have all ended before the next one's begin, so the time says whose a line is.
    """
    starts = [datetime.fromisoformat(event["time"]).timestamp() for event in iter_events(run, STARTED)]
    made: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for path in log.glob("*.jsonl"):
        for line in path.read_text("utf-8").splitlines(keepends=True):
            if line.endswith("\n"):  # a killed rank may leave half a line
                row = json.loads(line)
                made[row["step"]][sum(start <= row["time"] for start in starts)] += row["samples"]
    return {step: sorted(attempts[max(attempts)]) for step, attempts in sorted(made.items())}
