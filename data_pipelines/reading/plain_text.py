"""Plain text and HTML: a file is a document, or a separator cuts it into several."""

import codecs
from collections.abc import Iterator

from data_pipelines.reading import opened as files
from data_pipelines.reading.inputs import ReadReport
from data_pipelines.reading.opened import Opened
from data_pipelines.reading.records import ReadOptions, Record
from llmtrain.errors import DataError


def read_text(opened: Opened, report: ReadReport, options: ReadOptions) -> Iterator[Record]:
    """The text of a file, or its parts between separators."""
    if options.separator:
        yield from _read_parts(opened, report, options.separator)
        return
    content = opened.whole()
    if content is None:
        report.refuse("too_long", opened.path, opened.too_long(opened.path))
        return
    try:
        yield Record(content.decode("utf-8-sig"))  # bytes: line ends stay as they are
    except UnicodeDecodeError:
        report.leave_out("not_text", opened.path)


def read_html(opened: Opened, report: ReadReport, options: ReadOptions) -> Iterator[Record]:
    """The source of a page, in the encoding that it or its bytes say."""
    content = opened.whole()
    if content is None:
        report.refuse("too_long", opened.path, opened.too_long(opened.path))
        return
    yield Record(page_text(content))


def page_text(content: bytes) -> str:
    """The text of a page's bytes, whose encoding is looked for as browsers do."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        from resiliparse.parse.encoding import bytes_to_str, detect_encoding

        return bytes_to_str(content, detect_encoding(content) or "latin-1")


def _read_parts(opened: Opened, report: ReadReport, separator: str) -> Iterator[Record]:
    """The texts between separators, without holding the file. Of one that is too long no more is held than may be."""
    # Only at the begin of a file the mark of its encoding is none of the text.
    decoder = codecs.getincrementaldecoder("utf-8" if opened.first else "utf-8-sig")()
    pending: list[str] = []
    end, number, length = "", opened.first, 0
    while True:
        block = opened.file.read(files.BLOCK_BYTES)
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError:
            if number > opened.first:
                message = f"{opened.path}: is not UTF-8 text behind its part {number}. Repair it or leave it out."
                report.refuse("damaged", opened.path, DataError(message))
            else:
                report.leave_out("not_text", opened.path)
            return
        # Only the last characters of what is pending may belong to a separator that this block goes on with.
        first, *others = (end + text).split(separator)
        if others or not block:
            parts = ["".join(pending) + first, *others[:-1]] if others else ["".join(pending) + first]
            lengths = [length + len(first), *map(len, others[:-1])]
            for part, size in zip(parts, lengths, strict=False):
                number += 1
                if size > opened.longest:
                    where = f"{opened.path}:{number}"
                    report.refuse("too_long", where, opened.too_long(where))
                else:
                    yield Record(part, str(number))
            pending, first, length = [], others[-1] if others else "", 0
        if not block:
            if others:
                yield Record(first, str(number + 1))
            return
        keep = max(0, len(first) - len(separator) + 1)
        length += keep
        if length <= opened.longest:
            pending.append(first[:keep])
        else:
            pending = []
        end = first[keep:]
