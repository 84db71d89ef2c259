"""The texts of files as they lie about, whatever they hold and however they are compressed.

What a file is, its name says, in capitals or not; docs/concepts.md has the table.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from data_pipelines.reading.formats import iter_records
from data_pipelines.reading.inputs import ReadReport, find_files
from data_pipelines.reading.records import ReadOptions
from llmtrain.errors import ConfigError


def iter_documents(
    inputs: Sequence[str | Path], report: ReadReport, options: ReadOptions | None = None
) -> Iterator[str]:
    """The documents of all inputs, in an order that depends only on names.

    An input is a file, a folder, a glob pattern or a URL. What is left out is counted in `report`. Raises ConfigError
    for an input that does not exist or cannot be read as text, and where there is not one document; DataError for a
    broken line or file.
    """
    options = options or ReadOptions()
    for file in find_files(inputs, report):
        report.files += 1
        for record in iter_records(file, report, options):
            if not record.text:
                report.leave_out("empty", file.name)
                continue
            report.documents += 1
            report.text_bytes += len(record.text.encode())
            yield record.text
    if not report.documents:
        raise ConfigError(f"{', '.join(map(str, inputs))}: no text in it: {report.summary()}.")
