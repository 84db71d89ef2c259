"""JSON lines, and JSON files that hold an object with text or a list of them."""

import json
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from data_pipelines.reading.inputs import ReadReport
from data_pipelines.reading.opened import Opened
from data_pipelines.reading.records import ReadOptions, Record, record_of
from llmtrain.errors import DataError


def read_json_lines(opened: Opened, report: ReadReport, options: ReadOptions) -> Iterator[Record]:
    """The documents of a file with an object in each line."""
    yield from _read_lines(opened.lines(), opened, report, options)


def _read_lines(
    lines: Iterable[bytes | None], opened: Opened, report: ReadReport, options: ReadOptions
) -> Iterator[Record]:
    for number, line in enumerate(lines, opened.first + 1):
        where = f"{opened.path}:{number}"
        if line is None:
            report.refuse("too_long", where, opened.too_long(where))
            continue
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except UnicodeError:
            report.leave_out("not_text", where)
            continue
        except ValueError as error:  # not JSON, or a number of thousands of digits
            message = f"{where}: not JSON ({error}). Each line must be one JSON object."
            report.refuse("not_json", where, DataError(message))
            continue
        except RecursionError:
            message = f"{where}: must be an object whose key {options.json_field!r} holds text; --field names it."
            report.refuse("not_json", where, DataError(message))
            continue
        if (record := record_of(item, str(number), opened, report, options)) is not None:
            yield record


def read_json(opened: Opened, report: ReadReport, options: ReadOptions) -> Iterator[Record]:
    """An object with text, a list of such objects, or JSON lines under another name, as many data sets have them."""
    first = next(opened.lines(), b"")
    second = next(opened.lines(), b"") if first is not None and isinstance(_parsed(first), dict) else b""
    if first is None or second is None:
        report.refuse("too_long", opened.path, opened.too_long(opened.path))
        return
    if second.strip() and isinstance(_parsed(second), dict):
        yield from _read_lines(chain((first, second), opened.lines()), opened, report, options)
        return
    rest = opened.whole()
    if rest is None:
        report.refuse("too_long", opened.path, opened.too_long(opened.path))
        return
    value = _parsed(first + second + rest)
    items = value if isinstance(value, list) else [value]
    texts = [item.get(options.json_field) if isinstance(item, dict) else None for item in items]
    if not texts or not all(isinstance(text, str) for text in texts):
        if opened.source.named:
            report.refuse("no_field", opened.path, DataError(_json_advice(opened.path, value, options.json_field)))
        else:
            report.leave_out("no_field", opened.path)
        return
    places = [str(number) for number in range(1, len(items) + 1)] if isinstance(value, list) else [""]
    for item, place in zip(items, places, strict=True):
        if (record := record_of(item, place, opened, report, options)) is not None:
            yield record


def _parsed(content: bytes) -> Any:
    """The value of a JSON text, or the error that says why there is none."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        return error


def _json_advice(path: str, value: Any, json_field: str) -> str:
    why = f"is not JSON ({value})" if isinstance(value, Exception) else "holds something else"
    return (
        f"{path}: {why}. A .json file must be an object whose key {json_field!r} holds text (--field names it), or a "
        "list of such objects. Name it .jsonl where each line is an object, .txt to take it as plain text."
    )
