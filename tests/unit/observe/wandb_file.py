"""Reads the rows that W&B wrote offline.

W&B's records are protocol buffers in a log of LevelDB's format: blocks of 32 KiB, in which each chunk has a checksum (4
bytes), a length (2) and a type (1: whole record, 2: first, 3: middle, 4: last part). The file starts with 7 bytes of
its own. Its Python package has the records' definition but no longer a reader.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

_BLOCK_BYTES = 32 * 1024
_CHUNK_HEADER_BYTES = 7


def iter_records(path: Path) -> Iterator[Record]:
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, parts = 7, b""
    while position + _CHUNK_HEADER_BYTES <= len(data):
        left_in_block = _BLOCK_BYTES - position % _BLOCK_BYTES
        if left_in_block < _CHUNK_HEADER_BYTES:
            position += left_in_block
            continue
        size = int.from_bytes(data[position + 4 : position + 6], "little")
        kind = data[position + 6]
        start = position + _CHUNK_HEADER_BYTES
        parts += data[start : start + size]
        position = start + size
        if kind in (1, 4):
            yield Record.FromString(parts)
            parts = b""


def history(path: Path) -> list[dict]:
    """The logged rows, without W&B's own columns."""
    rows = []
    for record in iter_records(path):
        if record.HasField("history"):
            cells = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append({key: value for key, value in cells.items() if not key.startswith("_")})
    return rows
