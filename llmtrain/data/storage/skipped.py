"""skipped_shards.jsonl: which damaged shards a run goes without, the same for every rank and after every resume."""

import logging
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import lock_descriptor

from llmtrain.errors import DataError
from llmtrain.files import open_regular, parse_line, read_bytes, sealed_line

_logger = logging.getLogger(__name__)

LEDGER_NAME = "skipped_shards.jsonl"


@dataclass(frozen=True)
class SkippedShard:
    """One line: a shard, the hash that the manifest expects, what was found instead, why, and the samples it had."""

    path: str
    sha256: str
    actual: str
    reason: str
    samples: int

    @property
    def key(self) -> tuple[str, str]:
        """The shard's identity wherever the data set was moved to: its name and the hash that it should have."""
        return shard_key(self.path, self.sha256)


def shard_key(path: str, sha256: str) -> tuple[str, str]:
    """The key of the shard at a path or URL."""
    return path.rpartition("/")[2], sha256


@dataclass(frozen=True)
class SourceSamples:
    """The shards of one source and the number of its samples, which the share of skipped ones is counted against."""

    name: str
    keys: frozenset[tuple[str, str]]
    samples: int


class SkippedShards:
    """The ledger of a run. Every rank has one; what one rank writes the others find before they open a shard."""

    def __init__(self, path: Path, max_share: float) -> None:
        """Read the ledger, where there is one. `max_share` is the share of a source's samples that may be skipped."""
        self.path = path
        self._max_share = max_share
        self.is_closed = False
        """True where nothing may be added any more: who only looks at a run skips no shard for it."""
        self._size = 0
        self._shards: dict[tuple[str, str], SkippedShard] = {}
        self.refresh()

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self._shards

    def refresh(self) -> bool:
        """Read what other ranks have added; whether there was anything. Raises DataError for a line that is none."""
        try:
            if self.path.stat().st_size == self._size:
                return False
            content = read_bytes(self.path)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror}") from None
        before = len(self._shards)
        self._size = len(content)
        for number, line in enumerate(content.splitlines(), start=1):
            try:
                row = parse_line(line)
                if row is None:
                    continue  # torn by a crash: that shard is found again
                shard = SkippedShard(**row)
            except (TypeError, ValueError) as error:
                what = f" ({error})" if isinstance(error, ValueError) else ""
                raise DataError(
                    f"{self.path}:{number}: not a skipped shard{what}: {line[:80]!r}. Remove that line: the shard is "
                    "found again."
                ) from None
            self._shards[shard.key] = shard
        return len(self._shards) > before

    def add(self, shard: SkippedShard, source: SourceSamples) -> None:
        """Record a shard on the disk, once whichever ranks find it, and warn.

        Raises DataError where the source would lose more than its share, or the ledger cannot be written.
        """
        try:
            with open_regular(self.path, "ab+") as file:
                lock_descriptor(file.fileno())
                self.refresh()  # under the lock: another rank may have added this shard while we waited for it
                if shard.key in self._shards:
                    return
                self._require_share([*self._shards.values(), shard], source)
                # A line that a crash has torn gets its end here: it spoils itself only.
                size = os.fstat(file.fileno()).st_size
                if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
                    file.write(b"\n")
                file.write(sealed_line(asdict(shard)))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DataError(
                f"{self.path}: cannot be written: {error.strerror}. A shard is not skipped without a record of it: "
                "free space there, or set data.on_corrupt=fail."
            ) from None
        self._shards[shard.key] = shard
        share = f"{shard.samples:,} of the {source.samples:,} samples of {source.name}"
        _logger.warning("skipping %s (%s): %s have no targets", shard.path, shard.reason, share)

    def require_share(self, source: SourceSamples) -> None:
        """Raise DataError where the ledger already lists more of a source than may be skipped."""
        self._require_share(self._shards.values(), source)

    def _require_share(self, shards: Iterable[SkippedShard], source: SourceSamples) -> None:
        lost = [shard for shard in shards if shard.key in source.keys]
        samples = sum(shard.samples for shard in lost)
        if samples <= self._max_share * source.samples:
            return
        lines = "".join(f"\n  {shard.path}: {shard.reason}, {shard.samples:,} samples" for shard in lost)
        needed = -(-samples * 10_000 // source.samples) / 10_000  # rounded up
        raise DataError(
            f"{source.name}: {samples:,} of {source.samples:,} samples lie in damaged shards, more than "
            f"data.max_skipped = {self._max_share:g} of them:{lines}\n"
            f"Copy these shards again, or set data.max_skipped={needed:g}."
        )
