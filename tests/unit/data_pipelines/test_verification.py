"""Every kind of damage to a data set is found, by the full check and by a run that reads it."""

import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.dataset_writer import ShardWriter
from data_pipelines.indexing import index_folder, rebuild_sidecars, scan_tar, stored_dtype
from data_pipelines.inspection import datasets_in, verify_dataset
from data_pipelines.tokenizer import train_tokenizer
from llmtrain.data.storage.manifest import MANIFEST_NAME, read_index, read_manifest
from llmtrain.data.storage.shard_file import ShardFile
from llmtrain.data.stream import SampleStream, StreamConfig, load_sources
from llmtrain.data.tokenizer import SentencePieceTokenizer
from llmtrain.errors import ConfigError, DataError
from tests.support.datasets import random_documents, write_dataset

TAR = "shard-000000.tar"
INDEX = "shard-000000.idx"


def cut(name: str, place: Callable[[np.ndarray], int]) -> Callable[[Path], None]:
    """Cut a file at a byte found from the places of its documents."""

    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: place(read_index(folder / INDEX).astype(int))])

    return damage


def flip(name: str, place: Callable[[np.ndarray], int]) -> Callable[[Path], None]:
    """Flip one bit of a file."""

    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[place(read_index(folder / INDEX).astype(int))] ^= 4
        (folder / name).write_bytes(content)

    return damage


DAMAGES: dict[str, Callable[[Path], None]] = {
    "cut inside data": cut(TAR, lambda places: places[5, 0] + 3),
    "cut at a sample boundary": cut(TAR, lambda places: places[5, 0] - 512),
    "cut at a member boundary": cut(TAR, lambda places: places[5, 0]),
    "cut inside a header": cut(TAR, lambda places: places[5, 0] - 300),
    "cut before the end blocks": cut(TAR, lambda places: places[-1, 0] + 512),
    "cut inside the end blocks": cut(TAR, lambda places: places[-1, 0] + 1024),
    "cut to nothing": cut(TAR, lambda _: 0),
    "header flip": flip(TAR, lambda places: places[5, 0] - 512 + 130),
    "first header flip": flip(TAR, lambda _: 130),
    "payload flip": flip(TAR, lambda places: places[5, 0]),
    "end block flip": flip(TAR, lambda places: places[-1, 0] + 700),
    "missing file": lambda folder: (folder / TAR).unlink(),
    "index flip": flip(INDEX, lambda _: 40),
    "index magic flip": flip(INDEX, lambda _: 0),
    "index cut": cut(INDEX, lambda _: 100),
    "missing index": lambda folder: (folder / INDEX).unlink(),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    documents = [document for document in random_documents(40) if len(document)][:20]
    write_dataset(tmp_path, [documents, random_documents(5, 1)])
    return tmp_path


def test_a_whole_data_set_has_no_problem(folder: Path) -> None:
    assert verify_dataset(folder) == []


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_named_and_never_read(folder: Path, name: str) -> None:
    manifest = read_manifest(folder)
    DAMAGES[name](folder)
    damaged = INDEX if "index" in name else TAR
    problems = verify_dataset(folder)
    assert problems and all(damaged in problem for problem in problems)
    assert "missing" in problems[0] if "missing" in name else "expected" in problems[0] and "actual" in problems[0]
    with pytest.raises(DataError, match=damaged) as error:
        ShardFile(folder, manifest, 0)
    assert "missing" in str(error.value) or ("expected" in str(error.value) and "actual" in str(error.value))


@pytest.mark.parametrize("name", [name for name in DAMAGES if "cut" in name and "index" not in name])
def test_a_cut_is_seen_by_size_even_where_nothing_is_hashed(folder: Path, name: str) -> None:
    manifest = read_manifest(folder)
    DAMAGES[name](folder)
    with pytest.raises(DataError, match="bytes"):
        ShardFile(folder, manifest, 0, hashed=False)


@pytest.mark.parametrize(
    "name", [name for name in DAMAGES if "index" not in name and name not in ("payload flip", "missing file")]
)
def test_a_scan_without_manifest_sees_every_damage_to_the_structure(folder: Path, name: str) -> None:
    DAMAGES[name](folder)
    with pytest.raises(DataError, match=TAR):
        scan_tar(folder / TAR)


def test_the_usual_reader_loses_documents_silently(folder: Path) -> None:
    """Why the scan is strict: this is what the standard library makes of a damaged header."""
    DAMAGES["header flip"](folder)
    with tarfile.open(folder / TAR) as tar:
        assert len(tar.getmembers()) == 5


def test_every_problem_is_listed(folder: Path) -> None:
    DAMAGES["payload flip"](folder)
    (folder / "shard-000001.tar").unlink()
    (folder / "stray.tar").touch()
    problems = verify_dataset(folder)
    assert [any(name in p for p in problems) for name in (TAR, "shard-000001.tar", "stray.tar")] == [True] * 3


def test_ids_outside_of_the_vocabulary_are_a_problem(tmp_path: Path) -> None:
    write_dataset(tmp_path, [[np.array([5, 299]), np.array([300, 4])]])
    problems = verify_dataset(tmp_path)
    assert len(problems) == 1
    assert "document 1 has token id 300" in problems[0]


def test_sidecars_are_rebuilt_as_they_were(folder: Path) -> None:
    before = (folder / INDEX).read_bytes()
    for damage in ("missing index", "index flip", "index cut"):
        DAMAGES[damage](folder)
        assert rebuild_sidecars(folder) == 1
        assert (folder / INDEX).read_bytes() == before
    assert rebuild_sidecars(folder) == 0
    DAMAGES["payload flip"](folder)
    (folder / INDEX).unlink()
    with pytest.raises(DataError, match="expected sha256"):  # a damaged shard is never declared whole
        rebuild_sidecars(folder)


def test_a_foreign_folder_is_indexed(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["some words to learn\n"] * 20, tmp_path / "t.model", 280)
    folder = tmp_path / "shards"
    documents = [document % 280 for document in random_documents(10)]
    written = write_dataset(folder, [documents, documents[:3]], 280, tokenizer.sha256)
    for path in (folder / MANIFEST_NAME, *folder.glob("*.idx")):
        path.unlink()
    assert index_folder(folder, tokenizer) == (written, 0)
    assert verify_dataset(folder) == []
    write_dataset(folder, [[np.array([280])]])
    with pytest.raises(DataError, match="token id 280"):
        index_folder(folder, tokenizer)
    with pytest.raises(DataError, match=r"no \.tar"):
        index_folder(tmp_path, tokenizer)


def write_foreign(folder: Path, documents: list[list[int]], dtype: str) -> None:
    """Two tars of members as others write them, and nothing beside them."""
    folder.mkdir()
    for number, part in enumerate((documents[::2], documents[1::2])):
        writer = ShardWriter(folder, f"their-{number}", np.dtype(dtype))
        for key, document in enumerate(part):
            writer.add(f"{key:09d}", np.array(document, dtype))
        writer.finish()
    for path in folder.glob("*.idx"):
        path.unlink()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    return train_tokenizer(["some words to learn\n"] * 20, tmp_path_factory.mktemp("tokenizer") / "t.model", 280)


THEIRS = [[5, 6, 7], [8, 0, 9, 10], [11], [12, 13]]


def stored(folder: Path) -> list[list[int]]:
    manifest = read_manifest(folder)
    shards = [ShardFile(folder, manifest, number) for number in range(len(manifest.shards))]
    return [shard.document(number).tolist() for shard in shards for number in range(shard.num_documents)]


@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<u8", "<i8", ">u2", ">u4"])
def test_ids_of_another_width_are_never_taken_for_narrow_ones(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, dtype: str
) -> None:
    folder = tmp_path / "shards"
    write_foreign(folder, THEIRS, dtype)
    expected = [*THEIRS[::2], *THEIRS[1::2]]
    if dtype == "<u2":
        assert index_folder(folder, tokenizer)[0].dtype == "uint16"
    elif dtype == "<u4":
        with pytest.raises(ConfigError, match=r"look like uint32.*--dtype uint32, or --dtype uint16"):
            index_folder(folder, tokenizer)
        assert not (folder / MANIFEST_NAME).exists()
        assert index_folder(folder, tokenizer, "uint32")[0].dtype == "uint32"
    else:
        with pytest.raises(DataError, match=r"64-bit|token id"):
            index_folder(folder, tokenizer)
        return
    assert stored(folder) == expected and verify_dataset(folder) == []


def test_a_type_that_is_said_is_taken(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    folder = tmp_path / "shards"
    write_foreign(folder, [[5, 0], [6, 0, 7, 0]], "<u2")
    with pytest.raises(ConfigError, match="--dtype uint16 if every second"):
        index_folder(folder, tokenizer)
    index_folder(folder, tokenizer, "uint16")
    assert stored(folder) == [[5, 0], [6, 0, 7, 0]]
    with pytest.raises(ConfigError, match=r"--dtype uint16: does not hold all ids of a vocabulary of 70,000"):
        stored_dtype([], 70_000, "uint16")
    write_foreign(tmp_path / "odd", [[5], [6, 7, 8]], "<u2")
    with pytest.raises(DataError, match=r"no multiple of 4.*--dtype"):
        index_folder(tmp_path / "odd", tokenizer, "uint32")


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_documents_that_bring_their_end_get_no_second_one(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, dtype: str
) -> None:
    """256 ids fill blocks of the tar exactly: the last document's last id has a block of its own."""
    eos, folder = tokenizer.eos_id, tmp_path / "shards"
    ended = [[5, 6, eos], [7, eos, 8], [eos], [9] * 256 + [eos], [10]]
    write_foreign(folder, ended, dtype)
    manifest, count = index_folder(folder, tokenizer, "uint32" if dtype == "<u4" else None)
    assert count == 3
    expected = [[5, 6], [], [10], [7, eos, 8], [9] * 256]
    assert stored(folder) == expected and manifest.num_tokens == sum(map(len, expected))
    assert verify_dataset(folder) == []
    stream = SampleStream(load_sources([folder], [1]), StreamConfig(1, 40))
    tokens = np.concatenate([stream.sample(number).tokens[1:] for number in range(40)]).tolist()
    assert max(len(run) for run in "".join("e" if token == eos else " " for token in tokens).split()) == 2
    before = {path: path.read_bytes() for path in folder.glob("*.idx")}
    for path in before:
        path.unlink()
    assert rebuild_sidecars(folder) == 2
    assert {path: path.read_bytes() for path in before} == before
    damaged = folder / "their-0.tar"
    content = bytearray(damaged.read_bytes())
    content[512 + 1] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(DataError, match="every header is whole, so the damage lies in the documents"):
        ShardFile(folder, manifest, 0)


def test_folders_that_hold_splits(tmp_path: Path) -> None:
    for name in ("train", "valid"):
        write_dataset(tmp_path / name, [random_documents(3)])
    assert datasets_in(tmp_path) == [tmp_path / "train", tmp_path / "valid"]
    assert datasets_in(tmp_path / "valid") == [tmp_path / "valid"]
    with pytest.raises(ConfigError, match="no such folder"):
        datasets_in(tmp_path / "none")
    (tmp_path / "valid" / MANIFEST_NAME).unlink()
    assert datasets_in(tmp_path) == [tmp_path / "train", tmp_path / "valid"]  # damaged, but meant to be a data set


def test_a_folder_without_shards_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a data set.*Name one"):
        datasets_in(tmp_path)
    write_dataset(tmp_path / "shards" / "train", [random_documents(3)])
    with pytest.raises(ConfigError, match=r"is not a data set.*Try .*shards/train\."):
        datasets_in(tmp_path)
