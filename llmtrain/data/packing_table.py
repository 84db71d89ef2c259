"""How many samples each shard of a data set makes when its documents are packed: counted once, then kept.

The samples of a shard follow from the lengths of its documents, which its sidecar says. All sidecars are read for that,
and no shard. The result is kept in the cache under a hash of them, so that a resume, the other ranks and other runs on
the same data read one small file.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock

from llmtrain.config.data import DataConfig
from llmtrain.data.packing import BEST_FIT, PackingPlan, PackingRule, ShardPacking
from llmtrain.data.storage.folders import DataFolder, fetch_config
from llmtrain.data.storage.manifest import DTYPES, Manifest
from llmtrain.errors import ConfigError, Problem
from llmtrain.files import parse_json, read_bytes, replace_file, sealed, unsealed
from llmtrain.words import counted

_logger = logging.getLogger(__name__)

FOLDER = "packing"
"""Of the cache."""

VERSION = 1
"""Of the packing itself: what is kept belongs to it."""

MANY_DOCUMENTS = 1_000_000
"""From so many on it takes seconds, and is said."""


@dataclass(frozen=True)
class Packing:
    """The packing of a data set into samples of `seq_len` tokens."""

    seq_len: int
    shards: tuple[ShardPacking, ...]
    rule: PackingRule = BEST_FIT

    @property
    def samples(self) -> int:
        """Samples of an epoch."""
        return sum(shard.samples for shard in self.shards)

    @property
    def cut_documents(self) -> int:
        return sum(shard.cut_documents for shard in self.shards)

    @property
    def dropped_documents(self) -> int:
        return sum(shard.dropped_documents for shard in self.shards)

    @property
    def longest(self) -> int:
        """Tokens of the longest document; 0 where long ones are cut."""
        return max((shard.longest for shard in self.shards), default=0)

    @property
    def padding_share(self) -> float:
        """Share of the positions that only fill samples up."""
        return sum(shard.padding for shard in self.shards) / max(1, self.samples * (self.seq_len + 1))


def packing_of(folder: DataFolder, manifest: Manifest, data: DataConfig) -> Packing | None:
    """The packing that a run's configuration wants of a data set, None for none.

    Raises ConfigError where documents are too long and may not be left out or leave no sample, and as `load_packing`.
    """
    kind = data.packing_kind
    if kind == "none":
        return None
    rule = PackingRule(kind, data.too_long)
    found = load_packing(folder, manifest, data.seq_len, fetch_config(data).cache_dir, rule)
    if found.dropped_documents and (rule.too_long == "error" or not found.samples):
        raise ConfigError([_too_long(folder, found, data)])
    return found


def _too_long(folder: DataFolder, packing: Packing, data: DataConfig) -> Problem:
    """Documents that no sample of the run can hold: none of them may be left out, or nothing would be left."""
    ways = ["drop"] * (packing.samples > 0) + ["truncate"] * (data.objective == "chat")
    message = (
        f"{folder} has {counted(packing.dropped_documents, 'document')} of more than data.seq_len = {data.seq_len} "
        f"tokens, the longest of {packing.longest:,}{', and none that fits' * (not packing.samples)}. "
        f"Set {''.join(f'{way}, or ' for way in ways)}data.seq_len={packing.longest}."
    )
    return Problem(f"data.{data.objective}.too_long", message, data.too_long, uses=("data.seq_len",))


def load_packing(
    folder: DataFolder, manifest: Manifest, seq_len: int, cache_dir: Path, rule: PackingRule = BEST_FIT
) -> Packing:
    """The packing of a data set, from the cache where it is there, else counted and put there.

    Raises DataError where a sidecar is damaged or cannot be had: without it nobody knows which sample a number means.
    """
    # All that the packing follows from.
    meaning: list[object] = [VERSION, seq_len, manifest.dtype, [shard.index_sha256 for shard in manifest.shards]]
    # Those that may not be there are left out as those that are dropped.
    meaning += [] if rule == BEST_FIT else [rule.kind, rule.too_long.replace("error", "drop")]
    path = cache_dir / FOLDER / f"{hashlib.sha256(json.dumps(meaning).encode()).hexdigest()}.json"
    found = _kept(path, len(manifest.shards))
    if found is None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # The ranks of a machine wait for the first of them rather than count the same.
            with FileLock(path.with_suffix(".lock"), fallback_to_soft=False):
                found = _kept(path, len(manifest.shards)) or _counted(folder, manifest, seq_len, rule)
                rows = [list(astuple(shard)) for shard in found]
                replace_file(path, json.dumps(sealed({"shards": rows})).encode())
        except OSError as error:
            _logger.info("%s: cannot be kept: %s. The packing is counted at every start.", path, error.strerror)
            found = found or _counted(folder, manifest, seq_len, rule)
    return Packing(seq_len, found, rule)


def _kept(path: Path, num_shards: int) -> tuple[ShardPacking, ...] | None:
    """What the cache has; None where it has nothing, or something damaged, which is then written again."""
    try:
        rows: Sequence[Sequence[int]] = unsealed(parse_json(read_bytes(path)))["shards"]
        found = tuple(ShardPacking(*map(int, row)) for row in rows)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return found if len(found) == num_shards else None


def _counted(folder: DataFolder, manifest: Manifest, seq_len: int, rule: PackingRule) -> tuple[ShardPacking, ...]:
    if manifest.num_documents >= MANY_DOCUMENTS:
        _logger.info("%s: packing %s documents, once", folder, f"{manifest.num_documents:,}")
    itemsize = DTYPES[manifest.dtype].itemsize
    found = []
    for number in range(len(manifest.shards)):
        payloads = folder.read_sidecar(manifest, number).astype(np.int64)
        found.append(PackingPlan.of(payloads[:, 1] // itemsize, seq_len, rule).summary)
    return tuple(found)
