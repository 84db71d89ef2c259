"""Tables with a column of text: Parquet files, and the Arrow files of a Hugging Face data set on disk."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_pipelines.reading.inputs import ReadReport
from data_pipelines.reading.opened import Opened
from data_pipelines.reading.records import ReadOptions, Record, record_of
from llmtrain.errors import DataError

_ROWS = 512
"""Rows that are in memory at a time, as far as the file lets them be read so."""


def read_parquet(opened: Opened, report: ReadReport, options: ReadOptions) -> Iterator[Record]:
    """The rows of a Parquet file. Raises DataError where it is damaged or has no such column."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(opened.on_disk, page_checksum_verification=True) as file:
            columns = _columns(file.schema_arrow.names, opened, options)
            groups = None if opened.groups is None else list(range(*opened.groups))
            batches = file.iter_batches(_ROWS, row_groups=groups, columns=columns)
            yield from _rows(batches, opened, report, options)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(opened, error) from None


def read_arrow(opened: Opened, report: ReadReport, options: ReadOptions) -> Iterator[Record]:
    """The rows of an Arrow file, a stream or one with a footer. Raises as `read_parquet`."""
    import pyarrow

    assert opened.on_disk is not None
    try:
        with pyarrow.memory_map(str(opened.on_disk)) as file:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            if is_file:
                reader = pyarrow.ipc.open_file(file)
                batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
            else:
                reader = pyarrow.ipc.open_stream(file)
                batches = iter(reader)
            columns = _columns(reader.schema.names, opened, options)
            picked = (batch.select(columns) for batch in batches)
            slices = (batch.slice(row, _ROWS) for batch in picked for row in range(0, batch.num_rows, _ROWS))
            yield from _rows(slices, opened, report, options)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(opened, error) from None


def row_groups(path: Path) -> list[int]:
    """The rows of each group of a Parquet file. Raises DataError where it is damaged."""
    import pyarrow
    from pyarrow import parquet

    try:
        metadata = parquet.read_metadata(path)
        return [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a whole table ({error}). Copy it again or leave it out.") from None


def _columns(names: list[str], opened: Opened, options: ReadOptions) -> list[str]:
    wanted = [name for name in (options.json_field, options.id_field, options.url_field) if name is not None]
    for name in wanted:
        if name not in names:
            there = ", ".join(names[:20])
            raise DataError(f"{opened.path}: has no column {name!r}. Its columns: {there}. Name the one that is meant.")
    return list(dict.fromkeys(wanted))


def _rows(batches: Iterable[Any], opened: Opened, report: ReadReport, options: ReadOptions) -> Iterator[Record]:
    number = opened.first
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            if row[options.json_field] is None:
                report.leave_out("empty", f"{opened.path}:{number}")
            elif (record := record_of(row, str(number), opened, report, options)) is not None:
                yield record


def _damaged(opened: Opened, error: Exception) -> DataError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataError(f"{opened.path}: not a whole table ({reason}). Copy it again or leave it out.")
