"""One self-contained HTML page about one run, or several side by side: no network, no external file."""

import hashlib
import json
import math
import os
from base64 import b64encode
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from itertools import accumulate
from pathlib import Path
from typing import Any

from llmtrain.errors import ConfigError
from llmtrain.report.results import checkpoint_section, comparison, tiles, time_section, timeline_section
from llmtrain.report.run_record import MOST_POINTS, RunRecord, load_run, smoothed, task_columns, thinned
from llmtrain.report.settings import config_section, data_section, environment_section, model_section

LABEL_CURVES = ("valid_accuracy", "valid_macro_f1", "valid_entity_f1", "valid_exact_match", "valid_token_f1")
CURVES = (
    *("loss", "valid_loss", "lr", "grad_norm", "tokens_per_second", "moe/max_load", "moe/drop_rate"),
    *LABEL_CURVES,
)
SECTIONS = (
    model_section,
    data_section,
    time_section,
    timeline_section,
    checkpoint_section,
    config_section,
    environment_section,
)
SMOOTHED_CURVES = ("loss", "grad_norm", "tokens_per_second")


def write_report(runs: list[Path], out: Path) -> None:
    """Write a page about run folders to `out`. Raises ConfigError for a path that is none, DataError for damage."""
    if out.is_dir():
        raise ConfigError(f"--out {out}: is a folder. Name the page to write, such as {out / 'report.html'}.")
    page = render([load_run(path) for path in runs])
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    partial.write_text(page, encoding="utf-8")
    partial.replace(out)


def render(records: list[RunRecord]) -> str:
    """The page as text. What comes from a run is escaped, and only the page's own script may run (by its hash)."""
    style = _asset("page.css")
    script = _asset("page.js")
    allowed = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{allowed}'"
    title = " · ".join(record.name for record in records)
    summary = tiles(records[0]) if len(records) == 1 else comparison(records)
    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    details = "".join(section(records) for section in SECTIONS)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)} · llmtrain report</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<main>
{_header(records)}
{summary}
<div id="axes" class="axes" role="group" aria-label="What the curves are drawn over" hidden></div>
<section id="charts" class="charts" aria-label="Curves"><noscript><p>The curves are drawn by a script in this page;
this browser runs none. Their numbers are in metrics.jsonl.</p></noscript></section>
{details}
<footer>Written by llmtrain, {now}. Everything is in this file; it asks no server.</footer>
</main>
<script type="application/json" id="data">{script_json(chart_data(records))}</script>
<script>{script}</script>
</body>
</html>
"""


def chart_data(records: list[RunRecord]) -> dict[str, Any]:
    """The data of the page's script: per run a label, where it was resumed, and its curves; null is not finite."""
    labels, tasks = [record.name for record in records], task_columns(records)
    runs = []
    for record in records:
        curves = {key: record.curve(key) for key in (*CURVES, *tasks)}
        for key in SMOOTHED_CURVES:
            steps, values = curves[key]
            curves[f"smooth_{key}"] = (steps, smoothed(values))
        thin = {key: thinned(curve) for key, curve in curves.items()}
        runs.append(
            {
                "name": record.name if labels.count(record.name) == 1 else str(record.path),
                "resumes": sorted(set(record.resumes)),
                "places": _places(record),
                "curves": {
                    key: [steps, [value if math.isfinite(value) else None for value in values]]
                    for key, (steps, values) in thin.items()
                },
            }
        )
    return {"runs": runs}


def _places(record: RunRecord) -> dict[str, list[float]]:
    """Predicted tokens and seconds within steps after each step, for curves to be drawn over."""
    steps = [row["step"] for row in record.rows]
    tokens = [float(row.get("tokens", 0)) for row in record.rows]
    seconds = list(accumulate(record.step_seconds))
    kept = sorted({*range(0, len(steps), max(1, len(steps) // MOST_POINTS)), len(steps) - 1} - {-1})
    return {
        "steps": [steps[i] for i in kept],
        "tokens": [tokens[i] for i in kept],
        "seconds": [round(seconds[i], 3) for i in kept],
    }


def script_json(data: Any) -> str:
    """JSON that cannot end the script element that holds it."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _header(records: list[RunRecord]) -> str:
    if len(records) > 1:
        return f'<header><p class="overline">llmtrain report</p><h1>{len(records)} runs compared</h1></header>'
    record = records[0]
    status = str(record.status.get("status", "unknown"))
    message = escape(str(record.status.get("message", "")))
    model = record.config.get("model")
    shape = ""
    if isinstance(model, dict) and "hidden_size" in model:
        shape = f"{model.get('family', 'model')}, {model.get('num_layers')} layers, width {model.get('hidden_size')}"
    lines = [escape(line) for line in (shape, str(record.path)) if line]
    return (
        '<header><p class="overline">llmtrain report</p>'
        f'<h1>{escape(record.name)} <span class="status" data-status="{escape(status)}">{escape(status)}</span></h1>'
        + (f'<p class="lead">{message}</p>' if message else "")
        + f'<p class="muted">{" · ".join(lines)}</p></header>'
    )


def _asset(name: str) -> str:
    return files("llmtrain.report").joinpath("page_files", name).read_text(encoding="utf-8")
