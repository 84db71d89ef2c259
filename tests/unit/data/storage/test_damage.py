"""Every damage of a data set: found before a sample of it is used, with place, expected and actual; none is silent."""

import errno
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from llmtrain.data.storage import remote
from llmtrain.data.storage.manifest import DamagedFileError, file_sha256, index_bytes, read_index, read_manifest
from llmtrain.data.stream import SampleStream, StreamConfig, load_sources
from llmtrain.errors import DataError
from llmtrain.files import SEAL, sealed
from tests.support.datasets import random_documents, write_dataset

SEQ_LEN = 16
SHARD, INDEX, MANIFEST = "shard-000000.tar", "shard-000000.idx", "manifest.json"
DOCUMENT = 8
"""Where the damage is; the document has tokens."""

POLICIES: tuple[Literal["off", "first", "always"], ...] = ("off", "first", "always")


def place(folder: Path) -> tuple[int, int]:
    """First and last byte + 1 of the damaged document."""
    offset, size = read_index(folder / INDEX)[DOCUMENT].tolist()
    assert size > 4
    return offset, offset + size


def cut(at: Callable[[Path], int]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / SHARD).read_bytes()
        (folder / SHARD).write_bytes(content[: at(folder)])

    return damage


def flip(name: str, at: Callable[[Path], int], bit: int = 1) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[at(folder)] ^= bit
        (folder / name).write_bytes(content)

    return damage


def in_manifest(**change: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        manifest["shards"][0] |= change
        del manifest[SEAL]
        (folder / MANIFEST).write_text(json.dumps(sealed(manifest)))  # it contradicts the files, not itself

    return damage


def shifted(folder: Path) -> None:
    """The index names another place for one document, in every other way a right one."""
    places = read_index(folder / INDEX).copy()
    places[DOCUMENT, 0] += 512
    (folder / INDEX).write_bytes(index_bytes(places))


@dataclass(frozen=True)
class Damage:
    """`unseen`: what is not looked for with verify = off, and what comes of it there."""

    do: Callable[[Path], None]
    says: tuple[str, ...]
    unseen: Literal["", "harmless", "changed"] = ""


DAMAGES = {
    "cut inside a document": Damage(
        cut(lambda folder: place(folder)[0] + 3), (SHARD, "expected", "actual", f"inside document {DOCUMENT}")
    ),
    "cut where a document ends": Damage(
        cut(lambda folder: place(folder)[1]),
        (SHARD, "expected", "actual", f"before the header of document {DOCUMENT + 1}")
    ),
    "cut between members": Damage(
        cut(lambda folder: place(folder)[0] - 512),
        (SHARD, "expected", "actual", f"before the header of document {DOCUMENT}")
    ),
    "cut inside a header": Damage(
        cut(lambda folder: place(folder)[0] - 200),
        (SHARD, "expected", "actual", f"inside the header of document {DOCUMENT}")
    ),
    "cut behind the last document": Damage(
        cut(lambda folder: (folder / SHARD).stat().st_size - 512), (SHARD, "expected", "actual", "behind the last")
    ),
    "empty": Damage(cut(lambda folder: 0), (SHARD, "expected", "actual 0 bytes")),
    "longer": Damage(
        lambda folder: (folder / SHARD).write_bytes((folder / SHARD).read_bytes() + b"\0" * 512) and None,
        (SHARD, "expected", "actual", "512 bytes too many"),
    ),
    "header flip": Damage(
        flip(SHARD, lambda folder: place(folder)[0] - 512),
        (SHARD, "expected sha256", "actual", f"header of document {DOCUMENT} at byte"),
        unseen="harmless",  # documents are found by the index
    ),
    "document flip": Damage(
        flip(SHARD, lambda folder: place(folder)[0]),
        (SHARD, "expected sha256", "actual", "every header is whole"),
        unseen="changed",  # that is what off means
    ),
    "document flip to no id": Damage(
        flip(SHARD, lambda folder: place(folder)[0] + 1, bit=128), (SHARD, "expected", "actual")
    ),
    "missing shard": Damage(lambda folder: (folder / SHARD).unlink(), (SHARD, "missing")),
    "missing index": Damage(lambda folder: (folder / INDEX).unlink(), (INDEX, "missing")),
    "cut index": Damage(
        lambda folder: (folder / INDEX).write_bytes((folder / INDEX).read_bytes()[:-5]) and None,
        (INDEX, "expected", "actual")
    ),
    "shifted index": Damage(shifted, (INDEX,)),
    "manifest: bytes": Damage(in_manifest(bytes=1 << 20), (SHARD, "expected 1048576 bytes", "actual")),
    "manifest: sha256": Damage(in_manifest(sha256="0" * 64), (SHARD, "expected sha256 000", "actual"), "harmless"),
    "manifest: index": Damage(in_manifest(index_sha256="0" * 64), (INDEX, "expected sha256 000", "actual"), "harmless"),
    "manifest: documents": Damage(in_manifest(samples=29), (INDEX, "expected 29 documents", "actual 30")),
    "manifest: tokens": Damage(in_manifest(tokens=500), (INDEX, "with 500 tokens", "actual 30")),
}  # fmt: skip


def samples(folder: Path, verify: Literal["off", "first", "always"]) -> list[list[int]]:
    """All tokens of one epoch."""
    stream = SampleStream(load_sources([folder], [1]), StreamConfig(1, SEQ_LEN, 2, verify))
    return [stream.sample(n).tokens.tolist() for n in range(read_manifest(folder).num_windows(SEQ_LEN))]


@pytest.mark.parametrize("verify", POLICIES)
@pytest.mark.parametrize("name", DAMAGES)
def test_no_damage_is_silent(tmp_path: Path, name: str, verify: Literal["off", "first", "always"]) -> None:
    damage = DAMAGES[name]
    write_dataset(tmp_path, [random_documents(30)])
    whole = samples(tmp_path, verify)
    damage.do(tmp_path)
    if verify == "off" and damage.unseen:
        found = samples(tmp_path, verify)
        assert len(found) == len(whole)
        assert (found == whole) is (damage.unseen == "harmless")
        return
    with pytest.raises(DataError) as raised:
        samples(tmp_path, verify)
    for part in damage.says:
        assert part in str(raised.value)
    if name != "document flip to no id" or verify != "off":
        assert isinstance(raised.value, DamagedFileError)


def test_verify_first_does_not_see_what_happens_later_but_always_does(tmp_path: Path) -> None:
    """The difference between the two: a file that changes while it is in use, found when it is opened again."""
    write_dataset(tmp_path, [random_documents(30, seed) for seed in range(4)])
    entries = read_manifest(tmp_path)
    count = entries.num_windows(SEQ_LEN)
    streams = {
        verify: SampleStream(load_sources([tmp_path], [1]), StreamConfig(1, SEQ_LEN, 1, verify))
        for verify in ("first", "always")
    }  # of four shards two are open at a time
    for stream in streams.values():
        for number in range(count):
            stream.sample(number)
    for shard in range(4):
        flip(f"shard-{shard:06d}.tar", lambda folder: 0)(tmp_path)
    for number in range(count, 2 * count):
        streams["first"].sample(number)
    with pytest.raises(DamagedFileError, match="sha256"):
        for number in range(count, 2 * count):
            streams["always"].sample(number)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_passing_error_is_tried_again_and_then_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.001)
    write_dataset(tmp_path, [random_documents(30)])
    failures = [0]

    def failing(path: Path) -> str:
        failures[0] -= 1
        if failures[0] >= 0:
            raise OSError(code, "stumbled")
        return file_sha256(path)

    monkeypatch.setattr("llmtrain.data.storage.manifest.file_sha256", failing)
    whole = samples(tmp_path, "first")
    failures[0] = 3
    assert samples(tmp_path, "first") == whole
    failures[0] = 100
    with pytest.raises(DataError, match=rf"{SHARD}.*stumbled \(5 attempts\)") as raised:
        samples(tmp_path, "first")
    assert not isinstance(raised.value, DamagedFileError)


def test_an_error_that_stays_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path, [random_documents(30)])
    tries = []

    def refused(path: Path) -> str:
        tries.append(path)
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("llmtrain.data.storage.manifest.file_sha256", refused)
    with pytest.raises(DataError, match="Permission denied"):
        samples(tmp_path, "first")
    assert len(tries) == 1


def test_an_id_outside_the_vocabulary_is_named_with_its_byte(tmp_path: Path) -> None:
    write_dataset(tmp_path, [random_documents(30)])
    offset = place(tmp_path)[0] + 4
    flip(SHARD, lambda folder: offset + 1, bit=64)(tmp_path)
    token = int(np.frombuffer((tmp_path / SHARD).read_bytes()[offset : offset + 2], "<u2")[0])
    with pytest.raises(
        DataError, match=rf"document {DOCUMENT}, byte {offset}: expected an id below 300, actual {token}"
    ):
        samples(tmp_path, "off")
