"""The parts of the report about a run's history: where its time went, and what happened to it."""

from collections.abc import Mapping
from datetime import datetime
from html import escape
from typing import Any

from llmtrain.report.efficiency import DONE, STARTED, Efficiency, event_time
from llmtrain.report.run_record import RunRecord
from llmtrain.words import duration

MOST_EVENTS = 200
"""Events that the page shows of one run: the last ones."""

SENTENCES = {
    STARTED: "started on {ranks}, after step {step}",
    DONE: "all {step} steps",
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
    """What happened, in words."""
    try:
        ranks = {"ranks": _count(int(event["workers"]), "rank")} if "workers" in event else {}
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
    """What the audit log tells, oldest first, folded where several runs are compared."""
    tables = [(record, _timeline(record)) for record in records if record.events]
    if not tables:
        return ""
    if len(records) == 1:
        return f'<section><h2>What happened (UTC)</h2><div class="scroll tall">{tables[0][1]}</div></section>'
    folds = "".join(
        f"<details><summary>{escape(record.name)}<small>{_count(len(record.events), 'event')}</small></summary>"
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
        f"<small>{_length(seconds)}</small></li>"
        for kind, label, seconds in parts
    )
    title = f"{record.name}: {spent.ratio or 0:.1%} effective, {duration(spent.wall_seconds)} in all"
    return (
        f'<div class="spent"><p>{escape(title)}</p>'
        f'<div class="bar" role="img" aria-label="{escape(title)}">{pieces}</div>'
        f'<ul class="legend">{legend}</ul></div>'
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _length(seconds: float) -> str:
    return duration(seconds) if seconds >= 10 else f"{seconds:.1f} s"


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
