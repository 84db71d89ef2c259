"""Real documents that machines have anyway: Python's source, manual pages, documentation, licenses."""

import gzip
import random
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

_LONGEST = 200_000
"""Bytes: a few very long files would be half of the text."""


def real_documents(number: int) -> list[str]:
    """So many texts of files, or as many as there are, the same in every call; of each kind of file an equal share."""
    kinds = [
        sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")),
        sorted(Path("/usr/share/man").rglob("*.gz")),
        [path for path in sorted(Path("/usr/share/doc").rglob("*")) if path.suffix in ("", ".txt", ".html", ".gz")],
        sorted(Path("/usr/share/perl").rglob("*.pod")),
    ]
    for paths in kinds:
        random.Random(0).shuffle(paths)
    texts = [list(islice(_texts(paths), number)) for paths in kinds]
    share = -(-number // len(kinds))
    first = [text for found in texts for text in found[:share]]
    return [*first, *(text for found in texts for text in found[share:])][:number]


def _texts(paths: list[Path]) -> Iterator[str]:
    for path in paths:
        if not path.is_file() or path.stat().st_size > _LONGEST:
            continue
        content = path.read_bytes()
        try:
            yield (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
        except (UnicodeDecodeError, gzip.BadGzipFile):
            continue
