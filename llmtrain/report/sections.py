"""The parts of the report that are plain HTML: totals, comparison, checkpoints, configuration, environment."""

import math
import re
from html import escape
from typing import Any

from llmtrain.report.run_record import RunRecord, flat
from llmtrain.runs.attempts import STARTED
from llmtrain.runs.metrics_file import MOST
from llmtrain.words import duration, short_number

_YAML_LINE = re.compile(r"^(\s*(?:- )?)([A-Za-z0-9_.-]+)(:)(.*)$")
_ABSENT = "–"


def tiles(record: RunRecord) -> str:
    """Totals of one run, the most asked for first."""
    cells = [
        (label, value, note)
        for label, value, note in summary(record)
        if value != _ABSENT or label in ("Training loss", "Validation loss")
    ]
    items = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for label, value, note in cells
    )
    return f'<dl class="tiles">{items}</dl>'


def summary(record: RunRecord) -> list[tuple[str, str, str]]:
    """(label, value, note) for each total."""
    last = record.rows[-1] if record.rows else {}
    valid = record.evaluations[-1] if record.evaluations else {}
    best = min(record.evaluations, key=lambda row: _nan_last(row["valid_loss"]), default={})
    planned = (record.config.get("train") or {}).get("steps")
    seconds, rate = record.training_seconds, record.tokens_per_second
    tokens = last.get("tokens")
    mfus = [row["mfu"] for row in record.rows if "mfu" in row]
    skipped = record.skipped
    spent = record.efficiency
    resumed = ", ".join(f"{step:,}" for step in record.resumes[-3:])
    return [
        ("Training loss", _loss(last.get("loss")), f"at step {last['step']:,}" if last else ""),
        ("Validation loss", _loss(valid.get("valid_loss")), _perplexity(valid)),
        ("Best validation", _loss(best.get("valid_loss")), f"at step {best['step']:,}" if best else ""),
        ("Steps", f"{last.get('step', 0):,}", f"of {planned:,}" if isinstance(planned, int) else ""),
        ("Tokens", _ABSENT if tokens is None else short_number(tokens), f"{tokens:,}" if tokens else ""),
        ("Tokens per second", _ABSENT if rate is None else short_number(rate), "mean, training only"),
        ("MFU", f"{100 * sum(mfus) / len(mfus):.1f}%" if mfus else _ABSENT, "mean of the rows"),
        ("Training time", duration(seconds), _other_times(record)),
        ("Peak memory", _memory(record), ""),
        (
            "Effective time",
            _ABSENT if spent.ratio is None else f"{spent.ratio:.1%}",
            f"of {duration(spent.wall_seconds)}",
        ),
        ("Restarts", f"{spent.restarts:,}", f"from step {resumed}" if resumed else "one attempt"),
        ("Extensions", _any(spent.extensions), "more steps, once it was done"),
        ("Lost steps", f"{spent.lost_steps:,}", "done, and left behind" if spent.lost_steps else "none"),
        ("Rollbacks", _any(spent.rollbacks), "past bad steps"),
        ("Changes of size", _any(spent.resizes), "other numbers of ranks"),
        ("Slow ranks", _any(spent.stragglers), "times that one was named"),
        ("Skipped steps", str(skipped), "gradient not finite" if skipped else "none"),
    ]


def comparison(records: list[RunRecord]) -> str:
    """Totals side by side, and the configuration keys in which the runs differ."""
    columns = [summary(record) for record in records]
    head = "".join(
        f'<th scope="col"><span class="swatch s{index % 6}"></span>{escape(record.name)}'
        f"<small>{escape(str(record.status.get('status', 'unknown')))}</small></th>"
        for index, record in enumerate(records)
    )
    body = ""
    for index, (label, _, _) in enumerate(columns[0]):
        values = [column[index][1] for column in columns]
        if any(value != _ABSENT for value in values):
            cells = "".join(f"<td>{escape(value)}</td>" for value in values)
            body += f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>'
    return _table(head, body) + _differences(records, head)


def checkpoint_section(records: list[RunRecord]) -> str:
    rows = ""
    for record in records:
        losses = {row["step"]: row["valid_loss"] for row in record.evaluations}
        for entry in record.checkpoints:
            run = f"<td>{escape(record.name)}</td>" if len(records) > 1 else ""
            state = "complete" if entry.complete else "no checksum: damaged or still being written"
            rows += (
                f'<tr>{run}<th scope="row"><code>{escape(entry.name)}</code></th><td>{entry.step:,}</td>'
                f"<td>{_size(entry.size_bytes)}</td><td>{_loss(losses.get(entry.step))}</td><td>{state}</td></tr>"
            )
    if not rows:
        return ""
    names = (["Run"] if len(records) > 1 else []) + ["Folder", "Step", "Size", "Validation loss", "State"]
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    body = f'<div class="scroll"><table class="grid"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    return f"<section><h2>Checkpoints</h2>{body}</section>"


def data_section(records: list[RunRecord]) -> str:
    """What each run makes of its data, as its last start said it."""
    rows = ""
    for record in records:
        started = next((event for event in reversed(record.events) if event["event"] == STARTED), {})
        for source in _sources(started.get("data")):
            run = f"<td>{escape(record.name)}</td>" if len(records) > 1 else ""
            share = source["unused_tokens"] / max(1, source["tokens"])
            cells = (
                source["split"],
                f"{source['tokens']:,}",
                f"{source['samples']:,.0f}",
                f"{source['unused_tokens']:,} ({share:.1%})" if share else "none",
                f"{source['epochs']:,.3g}",
            )
            texts = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            rows += f'<tr>{run}<th scope="row"><code>{escape(source["path"])}</code></th>{texts}</tr>'
    if not rows:
        return ""
    names = ["Source", "For", "Tokens", "Samples per epoch", "Tokens in no sample", "Epochs planned"]
    names = (["Run"] if len(records) > 1 else []) + names
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    body = f'<div class="scroll"><table class="grid"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    return f"<section><h2>Data</h2>{body}</section>"


def _sources(data: object) -> list[dict[str, Any]]:
    """What an event says of data sources; one that says it in another way is left out."""
    texts, numbers = ("split", "path"), ("tokens", "samples", "unused_tokens", "epochs")
    return [
        source
        for source in (data if isinstance(data, list) else ())
        if isinstance(source, dict)
        and all(isinstance(source.get(key), str) for key in texts)
        and all(isinstance(source.get(key), int | float) and abs(source[key]) < MOST for key in numbers)
    ]


def config_section(records: list[RunRecord]) -> str:
    """The resolved YAML of each run, folded."""
    shown = [(record.name, record.config_text) for record in records if record.config_text]
    folds = "".join(
        f"<details><summary>{escape(name)}<small>config.yaml, {text.count(chr(10)):,} lines</small></summary>"
        f'<pre tabindex="0"><code>{_yaml_html(text)}</code></pre></details>'
        for name, text in shown
    )
    return f"<section><h2>Configuration</h2>{folds}</section>" if folds else ""


def environment_section(records: list[RunRecord]) -> str:
    folds = ""
    for record in records:
        rows = "".join(
            f'<tr><th scope="row">{escape(key.removeprefix("packages."))}</th><td>{escape(value)}</td></tr>'
            for key, value in _readable(record.environment).items()
        )
        if rows:
            table = f'<div class="scroll"><table class="grid keys"><tbody>{rows}</tbody></table></div>'
            folds += (
                f"<details><summary>{escape(record.name)}<small>machine and versions</small></summary>{table}</details>"
            )
    return f"<section><h2>Environment</h2>{folds}</section>" if folds else ""


def _readable(environment: dict) -> dict[str, str]:
    """Dotted keys with sizes in GiB, and devices counted rather than listed."""
    devices = environment.get("devices")
    devices = devices if isinstance(devices, list) else []
    names = sorted({str(device.get("name")) for device in devices if isinstance(device, dict)})
    shown = {**environment, "devices": f"{len(devices)} x {', '.join(names)}" if devices else "none but the CPU"}
    result = flat(shown)
    for key in [key for key in result if key.endswith("memory_bytes")]:
        size_bytes = result.pop(key)
        result[key.removesuffix("_bytes")] = _size(int(size_bytes)) if size_bytes.isdigit() else size_bytes
    return {key: value for key, value in result.items() if value != "null"}


def _differences(records: list[RunRecord], head: str) -> str:
    configs = [flat(record.config) for record in records]
    keys = [key for key in dict.fromkeys(key for config in configs for key in config) if key != "name"]
    body = ""
    for key in keys:
        values = [config.get(key, _ABSENT) for config in configs]
        if len(set(values)) > 1:
            cells = "".join(f'<td title="{escape(value)}">{escape(value)}</td>' for value in values)
            body += f'<tr><th scope="row"><code>{escape(key)}</code></th>{cells}</tr>'
    if not body:
        return '<p class="muted">The configurations are the same but for the name.</p>'
    return f"<section><h2>What differs in the configuration</h2>{_table(head, body, 'grid short')}</section>"


def _table(head: str, body: str, kind: str = "grid") -> str:
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _yaml_html(text: str) -> str:
    """YAML with its keys marked."""

    def line_html(line: str) -> str:
        match = _YAML_LINE.match(line)
        if match is None:
            return escape(line)
        indent, key, colon, value = match.groups()
        return f"{escape(indent)}<b>{escape(key)}</b>{colon}{escape(value)}"

    return "\n".join(line_html(line) for line in text.splitlines())


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.1f} MiB"


def _any(number: int) -> str:
    """A count that is told where there is something to count."""
    return f"{number:,}" if number else _ABSENT


def _share(value: float | None) -> str:
    return _ABSENT if value is None else f"{value:.1%}"


def _loss(value: float | None) -> str:
    return _ABSENT if value is None else f"{value:.4f}"


def _perplexity(row: dict) -> str:
    return f"perplexity {row['valid_perplexity']:,.2f}" if "valid_perplexity" in row else "not evaluated"


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _other_times(record: RunRecord) -> str:
    evaluation = sum(row.get("valid_seconds", 0.0) for row in record.evaluations)
    saving = sum(row.get("checkpoint_seconds", 0.0) for row in record.rows)
    return f"evaluation {duration(evaluation)}, saving {duration(saving)}"


def _memory(record: RunRecord) -> str:
    sizes = [row["memory_bytes"] for row in record.rows if "memory_bytes" in row]
    return _size(max(sizes)) if sizes else _ABSENT
