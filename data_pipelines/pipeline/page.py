"""report.html of a pipeline: what came in, what each step dropped and why, and examples to look at. No network."""

from collections.abc import Iterable, Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from llmtrain.files import replace_file
from llmtrain.words import counted, short_bytes, short_number

_MOST_ROWS = 40
"""Rows of a list that is drawn, such as languages."""

_NUMBERS = ("seen", "dropped", "share", "files", "documents", "text", "kept", "tokens")
"""Names of columns."""

_STYLE = """
.bar { display: block; height: 0.6rem; min-width: 1px; border-radius: 2px; background: var(--accent); }
.bar.gone { background: var(--bad); }
th { text-align: left; } th, td { padding: 5px 14px; vertical-align: top; }
td.number, th.number { text-align: right; white-space: nowrap; }
td.wide { width: 40%; vertical-align: middle; }
details pre, details p { margin-left: 16px; margin-right: 16px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0.4rem 0; padding: 0.6rem 0.8rem; border-radius: 8px;
  background: var(--grid); font: 12.5px/1.45 var(--mono); }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 0.8rem; }
@media (max-width: 700px) { .pair { grid-template-columns: 1fr; } }
"""


def write_page(summary: Mapping[str, Any], path: Path) -> None:
    """Write the page about a pipeline's summary. What comes from documents is escaped, and nothing on it can run."""
    style = files("llmtrain.report").joinpath("page_files", "page.css").read_text("utf-8") + _STYLE
    name = escape(summary["name"])
    body = "".join(section(summary) for section in (_tiles, _steps, _sources, _lengths, _languages, _examples))
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{name} · llmtrain data</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<main>
<header><p class="overline">llmtrain data pipeline</p><h1>{name}</h1></header>
{body}
<footer>Written by llmtrain. Everything is in this file; it asks no server.</footer>
</main>
</body>
</html>
"""
    replace_file(path, page.encode("utf-8", "replace"))


def _tiles(summary: Mapping[str, Any]) -> str:
    read = sum(source["documents"] for source in summary["sources"])
    kept = sum(source["kept"] for source in summary["sources"])
    size = sum(source["bytes"] for source in summary["sources"])
    tiles = [
        ("documents read", short_number(read), short_bytes(size)),
        ("documents kept", short_number(kept), f"{kept / max(1, read):.1%} of them"),
    ]
    for name, split in summary.get("splits", {}).items():
        detail = f"{counted(split['documents'], 'document')}, {counted(split['shards'], 'shard')}"
        tiles.append((f"tokens in {name}", short_number(split["tokens"]), detail))
    cells = "".join(
        f"<div><dt>{name}</dt><dd>{value}<small>{detail}</small></dd></div>" for name, value, detail in tiles
    )
    return f'<dl class="tiles">{cells}</dl>'


def _steps(summary: Mapping[str, Any]) -> str:
    """A row for each step and each reason for which it dropped something."""
    most = max((step["seen"] for step in summary["steps"]), default=0)
    rows: list[Iterable[str]] = []
    for number, step in enumerate(summary["steps"], 1):
        dropped = sum(step["dropped"].values())
        changed = ", ".join(f"{escape(name)} {count:,}" for name, count in step["changed"].items())
        rows.append((f"{number}. <strong>{escape(step['name'])}</strong>", f"{step['seen']:,}", f"{dropped:,}",
                     f"{dropped / max(1, step['seen']):.1%}", _bar(step["seen"], most)))  # fmt: skip
        rows += [
            (
                f"&emsp;{escape(reason)}",
                "",
                f"{count:,}",
                f"{count / max(1, step['seen']):.1%}",
                _bar(count, most, " gone"),
            )
            for reason, count in step["dropped"].items()
        ]
        if changed:
            rows.append((f'&emsp;<span class="muted">changed: {changed}</span>', "", "", "", ""))
    return _table("Steps", ("step", "seen", "dropped", "share", ""), rows)


def _sources(summary: Mapping[str, Any]) -> str:
    rows = []
    for source in summary["sources"]:
        left_out = "; ".join(
            f"{kind} {count:,} (such as {escape(', '.join(source['examples'].get(kind, [])[:2]))})"
            for kind, count in source["left_out"].items()
        )
        rows.append((escape(source["name"]), f"{source['files']:,}", f"{source['documents']:,}",
                     short_bytes(source["bytes"]), f"{source['kept']:,}", f"{source['tokens']:,}",
                     f"<small>{left_out}</small>"))  # fmt: skip
    heads = ("source", "files", "documents", "text", "kept", "tokens", "left out while reading")
    return _table("Sources", heads, rows)


def _lengths(summary: Mapping[str, Any]) -> str:
    lengths = {int(power): count for power, count in summary["kept"]["lengths"].items()}
    most = max(lengths.values(), default=0)
    rows = [
        (f"{short_bytes(2 ** max(0, power - 1))} to {short_bytes(2**power)}", f"{count:,}", _bar(count, most))
        for power, count in lengths.items()
    ]
    return _table("Lengths of documents behind the steps", ("size of text", "documents", ""), rows)


def _languages(summary: Mapping[str, Any]) -> str:
    languages = list(summary["kept"]["languages"].items())[:_MOST_ROWS]
    if not languages:
        return ""
    most = languages[0][1]
    rows = [(escape(name), f"{count:,}", _bar(count, most)) for name, count in languages]
    return _table("Languages", ("language", "documents", ""), rows)


def _examples(summary: Mapping[str, Any]) -> str:
    parts = []
    for step in summary["steps"]:
        for reason, examples in step["examples"].items():
            shown = "".join(map(_example, examples))
            title = f"{escape(step['name'])}: {escape(reason)} <span class='muted'>({step['dropped'][reason]:,})</span>"
            parts.append(f"<details><summary>{title}</summary>{shown}</details>")
    return f"<h2>Examples of what was dropped</h2>{''.join(parts)}" if parts else ""


def _example(example: list[str]) -> str:
    """A dropped document; a duplicate beside the one that stayed."""
    name, text, *kept = example
    gone = f"<div><p><small>{escape(name)}</small></p><pre>{escape(text)}</pre></div>"
    if not kept or not kept[0]:
        return gone
    head, _, stays = kept[0].partition("\n")
    kept_one = f"<div><p><small>stays: {escape(head)}</small></p><pre>{escape(stays)}</pre></div>"
    return f'<div class="pair">{gone}{kept_one}</div>'


def _bar(count: int, most: int, kind: str = "") -> str:
    return f'<span class="bar{kind}" style="width: {100 * count / max(1, most):.2f}%"></span>'


def _table(title: str, heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table; columns with a name of figures stand at the right."""
    names = list(heads)
    head = "".join(f"<th{_kind(name, '')}>{name}</th>" for name in names)
    body = "".join(
        f"<tr>{''.join(f'<td{_kind(name, cell)}>{cell}</td>' for name, cell in zip(names, row, strict=True))}</tr>"
        for row in rows
    )
    return (
        f'<h2>{title}</h2><div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _kind(name: str, cell: str) -> str:
    if name in _NUMBERS:
        return ' class="number"'
    return ' class="wide"' if "bar" in cell else ""
