"""What readers give: a text with its place and keys, and the options that all of them take."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from data_pipelines.reading.inputs import ReadReport
from data_pipelines.reading.opened import Opened
from llmtrain.errors import DataError


@dataclass(frozen=True)
class ReadOptions:
    """`json_field` is the key of a document's text; `separator` cuts plain text into documents.

    `id_field` and `url_field` are the keys of its id and URL.
    """

    json_field: str = "text"
    separator: str | None = None
    id_field: str | None = None
    url_field: str | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """A document as it was read. `place` is where in its file; a file that is one document has none."""

    text: str
    place: str = ""
    keys: Mapping[str, Any] = field(default_factory=dict)


Reader = Callable[[Opened, ReadReport, ReadOptions], Iterator[Record]]


def record_of(item: Any, place: str, opened: Opened, report: ReadReport, options: ReadOptions) -> Record | None:
    """The record of an object with keys; None where it has no text, which is counted.

    Raises DataError, unless the report is forgiving.
    """
    where = f"{opened.path}:{place}"
    text = item.get(options.json_field) if isinstance(item, Mapping) else None
    if not isinstance(text, str):
        message = f"{where}: must be an object whose key {options.json_field!r} holds text; --field names it."
        report.refuse("no_field", where, DataError(message))
        return None
    if len(text) > opened.longest:
        report.refuse("too_long", where, opened.too_long(where))
        return None
    try:
        text.encode()  # JSON can spell half of a surrogate pair, which is no text
    except UnicodeError:
        report.leave_out("not_text", where)
        return None
    return Record(text, place, item)
