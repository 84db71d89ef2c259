"""The parts of the report that say what came of runs: totals side by side, checkpoints, time, and what happened."""

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from typing import Any

from llmtrain.config.metrics import METRIC_TABLE, MetricName, titled
from llmtrain.report.efficiency import DONE, STOPPED_EARLY, Efficiency, event_time
from llmtrain.report.run_record import RunRecord, flat, task_columns
from llmtrain.runs.audit import STARTED
from llmtrain.values.label_metrics import LABEL_METRICS
from llmtrain.values.progress import TASK_SECONDS, task_title
from llmtrain.words import counted, duration, short_number

_ABSENT = "–"

MOST_EVENTS = 200
"""Events that the page shows of one run: the last ones."""

SENTENCES = {
    STARTED: "started on {ranks}, after step {step}",
    DONE: "all {step} steps",
    STOPPED_EARLY: "{reason}",
    "restarting": "rank {rank} on {host}, at step {step}: {cause}. Started again after step {saved_step}",
    "failed": "rank {rank} on {host}, at step {step}: {cause}",
    "stalled": "given up: rank {rank} on {host}, at step {step}: {cause}",
    "resized": "from {from_workers} ranks to {to_workers}, after step {step}",
    "rollback": "step {step} back to step {to_step}, past the data since: {reason}",
    "no_rollback": "step {step}: {reason}, and no checkpoint to go back to",
    "skipped_step": "step {step} made no update: {verdict}",
    "save_failed": "checkpoint of step {step}: {error}",
    "set_aside": "{folder}: {reason}",
    "changed": "{key} from {was} to {now}, after step {step}",
    "straggler": "rank {rank} on {host} is slow in section {section}, at step {step}: score {score}",
}
"""Events in words, of their facts and of `ranks`, their `workers` in words; where a fact is absent, or for another
event, all facts are listed."""

TROUBLE = {"failed": "bad", "stalled": "bad", "restarting": "warn", "rollback": "warn", "save_failed": "warn"}


def sentence(event: Mapping[str, Any]) -> str:
    """An event of the audit log in words."""
    try:
        ranks = {"ranks": counted(int(event["workers"]), "rank")} if "workers" in event else {}
        return SENTENCES[event["event"]].format_map({**event, **ranks})
    except (KeyError, TypeError, ValueError):
        facts = (f"{name} {value}" for name, value in event.items() if name not in ("time", "event"))
        return ", ".join(facts)


def time_section(records: list[RunRecord]) -> str:
    """One bar per run: the shares of its time."""
    bars = "".join(_bar(record) for record in records if record.efficiency.ratio is not None)
    if not bars:
        return ""
    note = (
        "From the first start to the last row. Effective is what went into steps that count; lost steps were done and "
        "left behind."
    )
    return f'<section><h2>Where the time went</h2>{bars}<p class="muted">{note}</p></section>'


def timeline_section(records: list[RunRecord]) -> str:
    """The events of the audit log, oldest first, folded where several runs are compared."""
    tables = [(record, _timeline(record)) for record in records if record.events]
    if not tables:
        return ""
    if len(records) == 1:
        return f'<section><h2>What happened (UTC)</h2><div class="scroll tall">{tables[0][1]}</div></section>'
    folds = "".join(
        f"<details><summary>{escape(record.name)}<small>{counted(len(record.events), 'event')}</small></summary>"
        f'<div class="scroll tall">{table}</div></details>'
        for record, table in tables
    )
    return f"<section><h2>What happened (UTC)</h2>{folds}</section>"


def _parts(spent: Efficiency) -> list[tuple[str, str, float]]:
    """(class, label, seconds)"""
    return [
        ("useful", "steps that count", spent.step_seconds),
        ("lost", "lost steps", spent.lost_seconds),
        ("evaluating", "evaluation", spent.evaluate_seconds),
        ("saving", "saving", spent.checkpoint_seconds),
        ("down", "hanging or stopped", spent.down_seconds),
        ("other", "starting, recording", spent.other_seconds),
    ]


def _bar(record: RunRecord) -> str:
    spent = record.efficiency
    parts = [(kind, label, seconds) for kind, label, seconds in _parts(spent) if seconds >= 0.0005 * spent.wall_seconds]
    total = sum(seconds for _, _, seconds in parts) or 1.0
    pieces = "".join(f'<i class="{kind}" style="width:{100 * seconds / total:.2f}%"></i>' for kind, _, seconds in parts)
    legend = "".join(
        f'<li><span class="swatch {kind}"></span>{label} {seconds / spent.wall_seconds:.1%}'
        f"<small>{duration(seconds) if seconds >= 10 else f'{seconds:.1f} s'}</small></li>"
        for kind, label, seconds in parts
    )
    title = f"{record.name}: {spent.ratio or 0:.1%} effective, {duration(spent.wall_seconds)} in all"
    return (
        f'<div class="spent"><p>{escape(title)}</p>'
        f'<div class="bar" role="img" aria-label="{escape(title)}">{pieces}</div>'
        f'<ul class="legend">{legend}</ul></div>'
    )


def _timeline(record: RunRecord) -> str:
    shown = record.events[-MOST_EVENTS:]
    first = event_time(record.events[0])
    rows = ""
    if len(record.events) > len(shown):
        earlier = f"{len(record.events) - len(shown):,} earlier events are in audit.jsonl"
        rows = f'<tr><td colspan="3">{earlier}</td></tr>'
    for event in shown:
        moment = datetime.fromisoformat(event["time"])
        kind = str(event["event"])
        rows += (
            f'<tr><th scope="row"><time datetime="{escape(event["time"])}">{moment:%Y-%m-%d %H:%M:%S}</time>'
            f"<small>+{duration(event_time(event) - first)}</small></th>"
            f'<td class="{TROUBLE.get(kind, "")}">{escape(kind.replace("_", " "))}</td>'
            f"<td>{escape(sentence(event))}</td></tr>"
        )
    return f'<table class="grid events"><tbody>{rows}</tbody></table>'


def tiles(record: RunRecord) -> str:
    """Totals of one run, the most asked for first."""
    cells = [
        (label, value, note)
        for label, value, note in summary(record, task_columns([record]))
        if value != _ABSENT or label in ("Training loss", "Validation loss")
    ]
    items = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for label, value, note in cells
    )
    return f'<dl class="tiles">{items}</dl>'


def summary(record: RunRecord, tasks: Sequence[str] = ()) -> list[tuple[str, str, str]]:
    """(label, value, note) for each total; `tasks` are the columns of metrics of tasks."""
    last = record.rows[-1] if record.rows else {}
    valid = record.evaluations[-1] if record.evaluations else {}
    planned = (record.config.get("train") or {}).get("steps")
    seconds, rate = record.training_seconds, record.tokens_per_second
    tokens = last.get("tokens")
    mfus = [row["mfu"] for row in record.rows if "mfu" in row]
    skipped = record.skipped
    perplexity = f"perplexity {valid['valid_perplexity']:,.2f}" if "valid_perplexity" in valid else "not evaluated"
    # All of them for every run: runs side by side have the same totals, and those that none has are left out.
    metrics = [(name, valid.get(f"valid_{name}")) for name in LABEL_METRICS]
    perplexity = "per label" if any(value is not None for _, value in metrics) else perplexity
    measured = record.tasks[-1] if record.tasks else {}
    evaluating = sum(row.get("valid_seconds", 0.0) for row in record.evaluations)
    evaluating += sum(row.get(TASK_SECONDS, 0.0) for row in record.tasks)
    saving = sum(row.get("checkpoint_seconds", 0.0) for row in record.rows)
    sizes = [row["memory_bytes"] for row in record.rows if "memory_bytes" in row]
    spent = record.efficiency
    resumed = ", ".join(f"{step:,}" for step in record.resumes[-3:])
    return [
        ("Training loss", _loss(last.get("loss")), f"at step {last['step']:,}" if last else ""),
        ("Validation loss", _loss(valid.get("valid_loss")), perplexity),
        *((titled(name), _ABSENT if value is None else f"{value:.2%}", "validation") for name, value in metrics),
        *((task_title(key), f"{measured[key]:.4f}" if key in measured else _ABSENT, "task") for key in tasks),
        ("Best validation", *_best(record)),
        ("Steps", f"{last.get('step', 0):,}", f"of {planned:,}" if isinstance(planned, int) else ""),
        ("Tokens", _ABSENT if tokens is None else short_number(tokens), f"{tokens:,}" if tokens else ""),
        ("Tokens per second", _ABSENT if rate is None else short_number(rate), "mean, training only"),
        ("MFU", f"{100 * sum(mfus) / len(mfus):.1f}%" if mfus else _ABSENT, "mean of the rows"),
        ("Training time", duration(seconds), f"evaluation {duration(evaluating)}, saving {duration(saving)}"),
        ("Peak memory", size_text(max(sizes)) if sizes else _ABSENT, ""),
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


def _best(record: RunRecord) -> tuple[str, str]:
    """The best value of the metric that the run goes by, and what is to be said of it."""
    name = _metric(record)
    row, column = METRIC_TABLE[name], f"valid_{name}"
    measured = [found for found in record.evaluations if math.isfinite(found.get(column, math.nan))]
    if not measured:
        return _ABSENT, ""
    best = max(measured, key=lambda found: (found[column] if row.rises else -found[column], -found["step"]))
    return _valid_text(best, name), ("" if name == "loss" else f"{titled(name).lower()} ") + f"at step {best['step']:,}"


def _metric(record: RunRecord) -> MetricName:
    asked = (record.config.get("evaluate") or {}).get("metric")
    known: list[MetricName] = [name for name in METRIC_TABLE if name == asked]
    return known[0] if known else "loss"


def _valid_text(row: Mapping[str, Any], name: MetricName) -> str:
    value = row.get(f"valid_{name}")
    return _ABSENT if value is None else _loss(value) if name == "loss" else f"{value:.2%}"


def comparison(records: list[RunRecord]) -> str:
    """Totals side by side, and the configuration keys in which the runs differ."""
    tasks = task_columns(records)
    columns = [summary(record, tasks) for record in records]
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
        name, measured = _metric(record), {row["step"]: row for row in record.evaluations}
        for entry in record.checkpoints:
            run = f"<td>{escape(record.name)}</td>" if len(records) > 1 else ""
            row = measured.get(entry.step, {})
            valid = _valid_text(row, "loss") + (
                f", {titled(name).lower()} {_valid_text(row, name)}" if name != "loss" else ""
            )
            state = "complete" if entry.complete else "no checksum: damaged or still being written"
            rows += (
                f'<tr>{run}<th scope="row"><code>{escape(entry.name)}</code></th><td>{entry.step:,}</td>'
                f"<td>{size_text(entry.size_bytes)}</td><td>{valid}</td><td>{state}</td></tr>"
            )
    if not rows:
        return ""
    names = (["Run"] if len(records) > 1 else []) + ["Folder", "Step", "Size", "Validation loss", "State"]
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    body = f'<div class="scroll"><table class="grid"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    return f"<section><h2>Checkpoints</h2>{body}</section>"


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


def size_text(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.1f} MiB"


def _any(number: int) -> str:
    """A count that is told where there is something to count."""
    return f"{number:,}" if number else _ABSENT


def _loss(value: float | None) -> str:
    return _ABSENT if value is None else f"{value:.4f}"
