"""A run folder, read for showing it: rows, curves, totals, configuration, environment and checkpoints."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from llmtrain.config.reading.credentials import text_without_credentials
from llmtrain.config.reading.document import LONGEST_BYTES, load_plain
from llmtrain.config.reading.rendering import redacted, without_secrets
from llmtrain.errors import ConfigError, DataError
from llmtrain.files import parse_json, read_bytes, unsealed, unsealed_text
from llmtrain.observe.machine import ENVIRONMENT_FILE
from llmtrain.report.efficiency import Efficiency, measure
from llmtrain.runs.audit import iter_events
from llmtrain.runs.metrics_file import METRICS_FILE, iter_rows, rows_that_count
from llmtrain.values.progress import RESUMED_FROM, TASK, row_kind

MOST_POINTS = 2000
"""A curve with more points than this is thinned for drawing."""

Curve = tuple[list[int], list[float]]
"""Steps and values; values may be NaN or infinite."""


@dataclass(frozen=True)
class CheckpointEntry:
    """One folder below `checkpoints`."""

    name: str
    step: int
    size_bytes: int
    complete: bool


@dataclass(frozen=True)
class RunRecord:
    """The content of a run folder. `rows` are training rows, `evaluations` those with `valid_loss`, `tasks` those of
    tasks; replaced ones are in none. `resumes` are the steps that rows say the run went back to, `events` its audit
    log.
    """

    path: Path
    name: str
    rows: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    tasks: list[dict[str, Any]]
    resumes: list[int]
    events: list[dict[str, Any]]
    efficiency: Efficiency
    status: dict[str, Any]
    config_text: str
    config: dict[str, Any]
    environment: dict[str, Any]
    checkpoints: list[CheckpointEntry]

    def curve(self, key: str) -> Curve:
        """A column of the rows (`valid_...`: of the evaluations, `task/...`: of those on tasks) over steps."""
        rows = self.evaluations if key.startswith("valid_") else self.tasks if key.startswith(TASK) else self.rows
        points = [(row["step"], float(row[key])) for row in rows if isinstance(row.get(key), int | float)]
        return [step for step, _ in points], [value for _, value in points]

    @property
    def step_seconds(self) -> list[float]:
        """The time that each row has for the steps since the row before it, without evaluation and checkpoints."""
        before = [0, *(row["step"] for row in self.rows)]
        pairs = zip(self.rows, before, strict=False)
        return [row.get("step_seconds", 0.0) * max(0, row["step"] - step) for row, step in pairs]

    @property
    def training_seconds(self) -> float:
        """Time spent in the steps that count."""
        return sum(self.step_seconds)

    @property
    def tokens_per_second(self) -> float | None:
        """Mean over the time in steps; None where nothing is known."""
        spent = [
            (seconds, row["tokens_per_second"])
            for row, seconds in zip(self.rows, self.step_seconds, strict=True)
            if seconds > 0 and "tokens_per_second" in row
        ]
        whole = sum(seconds for seconds, _ in spent)
        return sum(seconds * rate for seconds, rate in spent) / whole if whole else None

    @property
    def skipped(self) -> int:
        return sum(row.get("skipped", 0) for row in self.rows)


def load_run(path: Path) -> RunRecord:
    """Read a run folder; it may lack all but its metrics. Raises ConfigError where it is none, DataError for damage."""
    metrics = path / METRICS_FILE
    if not metrics.is_file():
        missing = f"has no {METRICS_FILE}" if path.is_dir() else "is not a folder"
        raise ConfigError(
            f"{path}: not a run folder: it {missing}. Give the folder that `llmtrain train` wrote: <output_dir>/<name>."
        )
    written = list(iter_rows(metrics))
    rows = rows_that_count(written)
    events = list(iter_events(path))
    config_text, config = _configuration(path / "config.yaml")
    # Runs of before have kept URLs as they were written.
    config_text = without_secrets(config_text, config) if config else text_without_credentials(config_text)
    config = redacted(config)
    return RunRecord(
        path=path,
        name=str(config.get("name") or path.resolve().name),
        rows=[row for row in rows if "loss" in row],
        evaluations=[row for row in rows if row_kind(row) == "evaluation"],
        tasks=[row for row in rows if row_kind(row) == "tasks"],
        resumes=[row[RESUMED_FROM] for row in written if RESUMED_FROM in row],
        events=events,
        efficiency=measure(written, events),
        status=_json(path / "status.json"),
        config_text=config_text,
        config=config,
        environment=_json(path / ENVIRONMENT_FILE),
        checkpoints=list(_checkpoints(path / "checkpoints")),
    )


def task_columns(records: Sequence[RunRecord]) -> list[str]:
    """The columns with metrics of tasks that any of the runs has."""
    rows = (row for record in records for row in record.tasks)
    return list(dict.fromkeys(key for row in rows for key in row if key.startswith(TASK)))


def smoothed(values: Sequence[float]) -> list[float]:
    """Mean over about a fortieth of the curve around each point, narrower near the start so that a steep one shows.

    Values that are not finite are left out; a point with no finite one around it is NaN.
    """
    widest = max(2, len(values) // 80)
    finite = [math.isfinite(value) for value in values]
    sums = list(accumulate((value if known else 0.0 for value, known in zip(values, finite, strict=True)), initial=0.0))
    counts = list(accumulate(finite, initial=0))
    result = []
    for index in range(len(values)):
        start = index - min(index // 2, widest)
        end = min(len(values), 2 * index - start + 1)
        count = counts[end] - counts[start]
        result.append((sums[end] - sums[start]) / count if count else math.nan)
    return result


def thinned(curve: Curve, most_points: int = MOST_POINTS) -> Curve:
    """At most `most_points` points of a curve: of each stretch the lowest and the highest, so that no spike is lost.

    The first and the last point stay. A stretch with a value that is not finite shows that value.
    """
    steps, values = curve
    count = len(values)
    if count <= most_points:
        return curve
    stretches = (most_points - 2) // 2
    chosen = {0, count - 1}
    for index in range(stretches):
        stretch = range(1 + index * (count - 2) // stretches, 1 + (index + 1) * (count - 2) // stretches)
        chosen.add(min(stretch, key=lambda i: (math.isfinite(values[i]), values[i])))
        chosen.add(max(stretch, key=lambda i: (math.isfinite(values[i]), values[i])))
    order = sorted(chosen)
    return [steps[i] for i in order], [values[i] for i in order]


def flat(config: Any, prefix: str = "") -> dict[str, str]:
    """A nested configuration as dotted keys and their values, as they are written in YAML."""
    if isinstance(config, list) and any(isinstance(entry, dict) for entry in config):
        config = {str(number): entry for number, entry in enumerate(config)}
    if not isinstance(config, dict):
        return {prefix: config if isinstance(config, str) else json.dumps(config, ensure_ascii=False, default=str)}
    result: dict[str, str] = {}
    for key, value in config.items():
        result.update(flat(value, f"{prefix}.{key}" if prefix else str(key)))
    return result


def _checkpoints(folder: Path) -> Iterator[CheckpointEntry]:
    for path in sorted(folder.glob("step-*")):
        number = path.name.removeprefix("step-")
        if number.isdigit() and path.is_dir():
            size_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            yield CheckpointEntry(path.name, int(number), size_bytes, (path / "manifest.json.sha256").is_file())


def _text(path: Path) -> str | None:
    """The text of a small file beside the metrics; None where there is none."""
    try:
        return read_bytes(path, LONGEST_BYTES).decode("utf-8", "replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _damaged(path, str(error.strerror)) from None


def _json(path: Path) -> dict[str, Any]:
    text = _text(path)
    if text is None:
        return {}
    try:
        data = parse_json(text)
        return unsealed(data) if isinstance(data, dict) else {}
    except ValueError as error:
        raise _damaged(path, str(error)) from None


def _configuration(path: Path) -> tuple[str, dict[str, Any]]:
    """The resolved configuration, as text and as data; nothing where the folder has none."""
    text = _text(path)
    if text is None:
        return "", {}
    try:
        text = unsealed_text(text)
        data = load_plain(text)
    except ValueError as error:
        raise _damaged(path, str(error)) from None
    if not isinstance(data, dict):
        raise _damaged(path, "it is not the configuration of a run")
    return text, data


def _damaged(path: Path, fault: str) -> DataError:
    return DataError(
        f"{path}: is damaged: {fault.rstrip('.')}. Remove it: a report goes without, and a start writes it again."
    )
