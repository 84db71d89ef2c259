"""The second member of documents: written, found at once, read by others, and checked as hard as the first."""

import io
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data_pipelines.indexing import index_folder, rebuild_sidecars
from data_pipelines.inspection import summarize, verify_dataset
from data_pipelines.tar_members import scan_pairs
from llmtrain.data.storage.folders import open_folder
from llmtrain.data.storage.manifest import Manifest, index_bytes, read_index, read_manifest, write_manifest
from llmtrain.data.storage.remote import FetchConfig
from llmtrain.data.storage.shard_file import ShardFile
from llmtrain.data.storage.targets import NO_LABEL, LabelsRecord
from llmtrain.errors import DataError
from tests.support.datasets import (
    chat_record,
    random_conversations,
    random_documents,
    write_dataset,
    write_target_dataset,
)
from tests.support.http_folder import serve
from tests.support.tokenizers import saved_tokenizer, train_sentencepiece

TAR, INDEX = "shard-000000.tar", "shard-000000.idx"
CHATS = [random_conversations(20, seed) for seed in range(2)]
TAGS = LabelsRecord("tagging", ("O", "B", "I"))
TAGGED = [[(ids, np.arange(len(ids)) % 4 - 1) for ids in random_documents(12, longest=9)]]
TAGGED = [[(ids, np.where(tags < 0, NO_LABEL, tags)) for ids, tags in TAGGED[0]]]


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    write_target_dataset(tmp_path / "chats", CHATS, chat_record())
    return tmp_path / "chats"


def test_shards_of_before_are_the_same_bytes(tmp_path: Path) -> None:
    documents = [np.arange(4, 4 + length) for length in (0, 7, 300, 1)]
    write_dataset(tmp_path / "a", [documents])
    digest = sha256(b"".join(path.read_bytes() for path in sorted((tmp_path / "a").iterdir()))).hexdigest()
    assert digest == "de7f83ae34bb4823ca33636e2cc6cdfc287bc71a3fb73a79ce75d5ec476ac6fb"


@pytest.mark.parametrize("shards", ["chats", "tags"])
def test_members_are_found_without_reading_the_shard(tmp_path: Path, shards: str) -> None:
    written, record = (CHATS, chat_record()) if shards == "chats" else (TAGGED, TAGS)
    write_target_dataset(tmp_path / "a", written, record)
    manifest = read_manifest(tmp_path / "a")
    assert (manifest.chat or manifest.labels) == record
    for number, documents in enumerate(written):
        shard = ShardFile(tmp_path / "a", manifest, number)
        for document, (ids, targets) in reversed(list(enumerate(documents))):
            assert shard.document(document).tolist() == ids.tolist()
            assert shard.targets(document).tolist() == targets.tolist()
            assert shard.key(document) == f"{document:09d}"
        places = read_index(tmp_path / "a" / f"shard-{number:06d}.idx")
        suffix = ".trained" if shards == "chats" else ".labels"
        assert np.array_equal(places, scan_pairs(tmp_path / "a" / f"shard-{number:06d}.tar", suffix))
    assert verify_dataset(tmp_path / "a") == []


def test_the_stock_library_reads_both_members(chats: Path) -> None:
    found = list(webdataset.WebDataset(str(chats / TAR), shardshuffle=False, empty_check=False))
    assert len(found) == len(CHATS[0])
    for sample, (ids, spans) in zip(found, CHATS[0], strict=True):
        assert np.frombuffer(sample["bin"], "<u2").tolist() == ids.tolist()
        assert np.frombuffer(sample["trained"], "<u4").reshape(-1, 2).tolist() == spans.tolist()


def test_lost_sidecars_are_rebuilt(chats: Path) -> None:
    was = (chats / INDEX).read_bytes()
    (chats / INDEX).unlink()
    assert rebuild_sidecars(chats) == 1 and (chats / INDEX).read_bytes() == was


def test_a_folder_without_its_manifest_says_who_knows_what_spans_mean(chats: Path, tmp_path: Path) -> None:
    (chats / "manifest.json").unlink()
    tokenizer = saved_tokenizer(tmp_path / "t.model", train_sentencepiece(["a b c"] * 9, "bpe", 280))
    with pytest.raises(DataError, match=r"has \.trained members.*`llmtrain data chat`"):
        index_folder(chats, tokenizer)


def test_both_members_come_from_a_server(chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve(chats) as server:
        folder = open_folder(server.url, FetchConfig(tmp_path / "cache", 1, 5.0))
        manifest = folder.read_manifest()
        shard = folder.open_shard(manifest, 1, hashed=True)
        assert shard.targets(3).tolist() == CHATS[1][3][1].tolist()
        assert folder.read_sidecar(manifest, 1).shape == (20, 4)


def test_a_summary_says_what_is_trained(tmp_path: Path) -> None:
    write_target_dataset(tmp_path / "a", CHATS, chat_record(assistant=1234, tool=5))
    assert "1,234 of assistant, 5 of tool; template" in summarize(tmp_path / "a", 32).targets_text
    write_target_dataset(tmp_path / "b", TAGGED, TAGS)
    assert summarize(tmp_path / "b", 32).targets_text == "labels of tagging: O, B, I"


def rewritten(folder: Path, member: bytes, content: bytes) -> None:
    """Put other bytes into a member, with a manifest that knows their hash."""
    from llmtrain.data.storage.manifest import file_sha256

    whole = (folder / TAR).read_bytes()
    with tarfile.open(folder / TAR) as tar:
        place = tar.getmember(member.decode()).offset_data
    (folder / TAR).write_bytes(whole[:place] + content + whole[place + len(content) :])
    manifest = read_manifest(folder)
    entry = replace(manifest.shards[0], sha256=file_sha256(folder / TAR))
    write_manifest(folder, replace(manifest, shards=(entry, *manifest.shards[1:])))


@pytest.mark.parametrize(
    ("spans", "fault"),
    [
        ([[2, 2]], r"are empty or do not follow each other"),
        ([[4, 3]], r"are empty or do not follow each other"),
        ([[1, 2**31]], r"a span ends at 2147483648, and it has \d+ tokens"),
    ],
)
def test_spans_that_cannot_be_are_named(chats: Path, spans: list[list[int]], fault: str) -> None:
    rewritten(chats, b"000000007.trained", np.array(spans, "<u4").tobytes())
    with pytest.raises(DataError, match=rf"document 7 \(000000007\.trained\): .*{fault}"):
        ShardFile(chats, read_manifest(chats), 0).targets(7)
    assert any("000000007.trained" in problem for problem in verify_dataset(chats))


def test_labels_that_cannot_be_are_named(tmp_path: Path) -> None:
    write_target_dataset(tmp_path, TAGGED, TAGS)
    number = next(number for number, (ids, _) in enumerate(TAGGED[0]) if len(ids) > 1)
    rewritten(tmp_path, f"{number:09d}.labels".encode(), np.array([7], "<i4").tobytes())
    with pytest.raises(DataError, match=rf"document {number} .* it has the label 7, and there are 3"):
        ShardFile(tmp_path, read_manifest(tmp_path), 0).targets(number)
    short = [[(ids, tags[:-1] if len(tags) else tags) for ids, tags in TAGGED[0]]]
    write_target_dataset(tmp_path / "b", short, TAGS)
    assert "labels, and tagging wants" in verify_dataset(tmp_path / "b")[0]
    answers = [[(np.arange(6, 12), np.array(bounds))] for bounds in ([2, 4], [5, 9])]
    write_target_dataset(tmp_path / "c", answers, LabelsRecord("qa"))
    assert verify_dataset(tmp_path / "c")[0].endswith(
        "its answer [5, 9) is not in 6 tokens. Copy the file again; `llmtrain data verify` finds all of them."
    )


def without_a_member(folder: Path) -> None:
    whole = io.BytesIO()
    with tarfile.open(folder / TAR) as tar, tarfile.open(fileobj=whole, mode="w") as out:
        for member in tar:
            if member.name != "000000007.trained":
                out.addfile(member, tar.extractfile(member))
    (folder / TAR).write_bytes(whole.getvalue())


def flipped(name: str, at: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[int(read_index(folder / INDEX)[7, 2]) if at < 0 else at] ^= 4
        (folder / name).write_bytes(content)

    return damage


def of_one_member(folder: Path) -> None:
    (folder / INDEX).write_bytes(index_bytes(read_index(folder / INDEX)[:, :2]))


DAMAGES = {
    "a member is gone": without_a_member,
    "a bit of spans": flipped(TAR, -1),
    "a bit of the sidecar": flipped(INDEX, 16 + 7 * 32 + 16),
    "a sidecar of one member": of_one_member,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_damage_is_found_by_both_checks(chats: Path, damage: Callable[[Path], None]) -> None:
    damage(chats)
    assert verify_dataset(chats)
    with pytest.raises(DataError):
        ShardFile(chats, read_manifest(chats), 0)


def test_a_sidecar_of_the_other_kind_is_named_whatever_its_hash(chats: Path) -> None:
    of_one_member(chats)
    with pytest.raises(DataError, match="expected 2 of each, actual 1 members of a document"):
        ShardFile(chats, read_manifest(chats), 0, hashed=False)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda text: text.replace('"targets": "trained"', '"targets": "labels"'), "targets = labels"),
        (lambda text: text.replace('"a template"', '"another"'), "template_sha256"),
        (lambda text: text.replace('"targets": "trained",\n', ""), "targets = none"),
    ],
)
def test_a_manifest_agrees_with_itself(chats: Path, change: Callable[[str], str], fault: str) -> None:
    text = (chats / "manifest.json").read_text()
    changed = change(text)
    assert changed != text
    (chats / "manifest.json").write_text(changed)
    with pytest.raises(DataError, match=fault):
        read_manifest(chats)


def test_records_of_labels_agree_with_themselves() -> None:
    for task, names, fault in (
        ("qa", ("a",), "qa has none"),
        ("tagging", (), "the others need some"),
        ("classification", ("a", "a"), "occurs twice"),
    ):
        with pytest.raises(ValueError, match=fault):
            LabelsRecord(task, names)  # type: ignore[arg-type]


def test_old_data_sets_read_as_before(tmp_path: Path) -> None:
    written = write_dataset(tmp_path / "a", [random_documents(5)])
    read: Manifest = read_manifest(tmp_path / "a")
    assert read == written and read.targets == "none"
    shutil.rmtree(tmp_path / "a")
