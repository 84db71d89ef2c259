"""Archives of documents: WebDataset tars of text, and WARC files of web crawls. They are streamed, never extracted."""

import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO, Any

from data_pipelines.reading.inputs import ReadReport
from data_pipelines.reading.opened import BLOCK_BYTES, Opened
from data_pipelines.reading.plain_text import page_text
from data_pipelines.reading.records import ReadOptions, Record, record_of
from llmtrain.errors import DataError
from llmtrain.files import parse_json

_TEXT_MEMBERS = (".txt", ".text", ".md", ".html", ".htm", ".json")
_PAGE_RECORDS = ("response", "resource", "conversion")
_PAGES = ("text/html", "application/xhtml+xml", "text/plain")


def read_tar(opened: Opened, report: ReadReport, options: ReadOptions) -> Iterator[Record]:
    """The samples of a WebDataset tar: members whose names agree up to the first dot of their last part are one.

    A sample's text is its .txt or .html member, or the key of its .json member, whose other keys belong to it. Raises
    DataError where the archive is cut or damaged.
    """
    try:
        # A stream needs no seeking, and a link in it points nowhere.
        with tarfile.open(fileobj=opened.file, mode="r|") as tar:
            yield from _samples(tar, opened, report, options)
    except (tarfile.TarError, ValueError) as error:
        raise DataError(f"{opened.path}: not a whole tar archive ({error}). Copy it again or leave it out.") from None


def _samples(tar: tarfile.TarFile, opened: Opened, report: ReadReport, options: ReadOptions) -> Iterator[Record]:
    key: str | None = None
    sample: dict[str, bytes] = {}
    while (member := tar.next()) is not None:
        # The library would keep every header in memory.
        tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  documented, but not in typeshed
        path = PurePosixPath(member.name)
        where = f"{opened.path}:{member.name}"
        if member.isdir():
            continue
        if not member.isreg() or member.issparse() or path.is_absolute() or ".." in path.parts:
            report.leave_out("unsafe_name", where)
            continue
        stem, dot, rest = path.name.partition(".")
        suffix = f".{rest.rpartition('.')[2].lower()}" if dot else ""
        if suffix not in _TEXT_MEMBERS:
            report.leave_out("not_page", where)
            continue
        if member.size > opened.longest:
            report.refuse("too_long", where, opened.too_long(where))
            continue
        member_key = str(path.parent / stem)
        if member_key != key:
            yield from _record(key, sample, opened, report, options)
            key, sample = member_key, {}
        file = tar.extractfile(member)
        assert file is not None
        sample[suffix] = file.read()
    yield from _record(key, sample, opened, report, options)
    _check_end(tar)


def _record(
    key: str | None, sample: dict[str, bytes], opened: Opened, report: ReadReport, options: ReadOptions
) -> Iterator[Record]:
    if key is None:
        return
    where = f"{opened.path}:{key}"
    keys: Any = {}
    if ".json" in sample:
        try:
            keys = parse_json(sample.pop(".json"))
        except ValueError as error:
            report.refuse("not_json", where, DataError(f"{where}: its .json member is not JSON ({error})."))
            return
    if not sample:
        if (record := record_of(keys, key, opened, report, options)) is not None:
            yield record
        return
    suffix, content = next(iter(sample.items()))
    try:
        text = page_text(content) if suffix in (".html", ".htm") else content.decode("utf-8-sig")
    except UnicodeDecodeError:
        report.leave_out("not_text", where)
        return
    yield Record(text, key, keys if isinstance(keys, dict) else {})


def _check_end(tar: tarfile.TarFile) -> None:
    """An archive ends with two blocks of zeros, of which the library has read the first, and nothing else follows."""
    assert tar.fileobj is not None
    given, clean = 0, True
    while block := tar.fileobj.read(BLOCK_BYTES):
        given += len(block)
        clean = clean and not block.strip(b"\0")
    if not given or not clean:
        raise tarfile.ReadError("it does not end as an archive does: it is cut, or a header is damaged")


def read_warc(opened: Opened, report: ReadReport, options: ReadOptions) -> Iterator[Record]:
    """The pages of a crawl: responses with HTML or plain text. Their keys are `url` and `date`.

    Raises DataError where a record is cut.
    """
    from fastwarc.warc import ArchiveIterator

    number = opened.first
    try:
        # Whether a record is whole is seen before what is in it is looked at: the library takes what there is for all.
        stream: Any = _Stream(opened.file)
        for found in ArchiveIterator(stream, parse_http=False, stream_detect=False):
            number += 1
            where = f"{opened.path}:{number}"
            content = found.reader.read(opened.longest + 1)
            size = found.headers.get("Content-Length")
            if size is None or len(content) < min(int(size), opened.longest + 1):
                raise ValueError(f"record {number} is cut short")
            if found.headers.get("WARC-Type") not in _PAGE_RECORDS:
                report.leave_out("not_page", where)
                continue
            if len(content) > opened.longest:
                report.refuse("too_long", where, opened.too_long(where))
                continue
            found.set_bytes_content(content)
            yield from _page(found, where, number, report)
    except (OSError, ValueError) as error:
        raise DataError(f"{opened.path}: not a whole crawl ({error}). Copy it again or leave it out.") from None
    if number == opened.first:
        raise DataError(f"{opened.path}: not a crawl: it has no record. Copy it again or leave it out.")


class _Stream:
    """The library wants to know where it is, and must not find a `seek` that does not work."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._given = file, 0

    def read(self, size: int = -1) -> bytes:
        block = self._file.read(size)
        self._given += len(block)
        return block

    def tell(self) -> int:
        return self._given


def _page(found: Any, where: str, number: int, report: ReadReport) -> Iterator[Record]:
    if found.headers.get("Content-Type", "").startswith("application/http"):
        found.parse_http(auto_decode="all")
    kind = (found.http_content_type or found.headers.get("Content-Type") or "").partition(";")[0].strip().lower()
    if kind not in _PAGES:
        report.leave_out("not_page", where)
        return
    keys = {"url": found.headers.get("WARC-Target-URI") or "", "date": found.headers.get("WARC-Date") or ""}
    yield Record(page_text(found.reader.read()), found.headers.get("WARC-Record-ID") or str(number), keys)
