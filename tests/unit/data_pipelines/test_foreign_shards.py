"""Shards of others, written by their own libraries: indexed where they are, trained from, and refused where hostile."""

import io
import pickle
import shlex
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from typer.testing import CliRunner, Result

from data_pipelines.indexing import index_folder, rebuild_sidecars
from data_pipelines.inspection import verify_dataset
from llmtrain.cli.data import app
from llmtrain.data.storage.manifest import read_manifest
from llmtrain.data.storage.shard_file import ShardFile
from llmtrain.data.stream import SampleStream, StreamConfig, load_sources
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.errors import ConfigError, DataError
from llmtrain.values.tokenizer import Tokenizer
from tests.support.tokenizers import train_sentencepiece

TEXTS = [f"text {number}: " + "a line of it, " * (number % 5) for number in range(60)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    path.write_bytes(train_sentencepiece(TEXTS, "bpe", 320))
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def documents(tokenizer: Tokenizer) -> list[np.ndarray]:
    return [np.asarray(tokenizer.encode(text), np.int64) for text in TEXTS]


def write_arrays(folder: Path, documents: list[np.ndarray], dtype: str, keys: str = "{:06d}") -> None:
    folder.mkdir()
    for part in range(2):
        with webdataset.TarWriter(str(folder / f"part-{part}.tar")) as writer:
            for number in range(30 * part, 30 * part + 30):
                writer.write(
                    {"__key__": keys.format(number), "npy": documents[number].astype(dtype), "txt": TEXTS[number]}
                )


def write_megatron(folder: Path, documents: list[np.ndarray], dtype: type, ends: int | None = None) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    folder.mkdir()
    for part in range(2):
        builder = IndexedDatasetBuilder(str(folder / f"part-{part}.bin"), dtype=dtype)
        for document in documents[30 * part : 30 * part + 30]:
            ids = document if ends is None else np.append(document, ends)
            if len(ids) > 6:  # of two sequences, as sentences are
                builder.add_item(torch.from_numpy(ids[:3]))
                builder.add_item(torch.from_numpy(ids[3:]))
            else:
                builder.add_item(torch.from_numpy(ids))
            builder.end_document()
        builder.finalize(str(folder / f"part-{part}.idx"))


def read_back(folder: Path) -> list[list[int]]:
    manifest = read_manifest(folder)
    shards = [ShardFile(folder, manifest, number) for number in range(len(manifest.shards))]
    return [shard.document(number).tolist() for shard in shards for number in range(shard.num_documents)]


def require_whole(folder: Path, documents: list[np.ndarray], tokenizer: Tokenizer, container: str, dtype: str) -> None:
    """It has these documents, is found whole, lost sidecars come back, and its samples are windows of the stream."""
    manifest = read_manifest(folder)
    assert (manifest.container, manifest.dtype) == (container, dtype)
    assert read_back(folder) == [document.tolist() for document in documents]
    assert verify_dataset(folder) == []
    sidecar = folder / manifest.shards[1].index_file
    sidecar.unlink()
    assert rebuild_sidecars(folder) == 1 and verify_dataset(folder) == []
    stream = SampleStream(load_sources([folder], [1]), StreamConfig(1, 16, 2))
    whole = np.concatenate([np.append(document, tokenizer.eos_id) for document in documents])
    windows = np.lib.stride_tricks.sliding_window_view(whole, 17)
    for number in range(10):
        sample = stream.sample(number)
        parts = stream.documents(number)
        if len({part.shard for part in parts}) == 1:
            assert (windows == sample.tokens).all(1).any()


@pytest.mark.parametrize("dtype", ["uint16", "int32", "uint32", "int64"])
def test_arrays_of_webdataset(tmp_path: Path, documents: list[np.ndarray], tokenizer: Tokenizer, dtype: str) -> None:
    write_arrays(tmp_path / "data", documents, dtype)
    manifest, ended = index_folder(tmp_path / "data", tokenizer)
    assert manifest.num_documents == 60 and ended == 0
    stored = {"int32": "uint32", "int64": "uint64"}.get(dtype, dtype)
    require_whole(tmp_path / "data", documents, tokenizer, "npy", stored)
    shard = ShardFile(tmp_path / "data", manifest, 1)
    assert [shard.key(number) for number in (0, 29)] == ["000030", "000059"]
    with pytest.raises(ConfigError, match="say themselves"):
        index_folder(tmp_path / "data", tokenizer, "uint32")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("ends", [False, True])
def test_indexed_data_of_megatron(
    tmp_path: Path, documents: list[np.ndarray], tokenizer: Tokenizer, dtype: type, ends: bool
) -> None:
    write_megatron(tmp_path / "data", documents, dtype, tokenizer.eos_id if ends else None)
    manifest, ended = index_folder(tmp_path / "data", tokenizer)
    assert (manifest.num_documents, ended) == (60, 60 if ends else 0)
    require_whole(tmp_path / "data", documents, tokenizer, "megatron", "uint16" if dtype is np.uint16 else "uint32")
    assert ShardFile(tmp_path / "data", manifest, 0).key(7) == "7"


@pytest.mark.parametrize("kind", ["npy", "megatron"])
def test_a_changed_byte_is_found(tmp_path: Path, documents: list[np.ndarray], tokenizer: Tokenizer, kind: str) -> None:
    folder = tmp_path / "data"
    if kind == "npy":
        write_arrays(folder, documents, "int64")
    else:
        write_megatron(folder, documents, np.int32)
    manifest, _ = index_folder(folder, tokenizer)
    shard = folder / manifest.shards[0].file
    content = bytearray(shard.read_bytes())
    place = int(ShardFile(folder, manifest, 0)._first[3]) * (8 if kind == "npy" else 4)
    content[place + (7 if kind == "npy" else 3)] ^= 0x80  # a negative number
    shard.write_bytes(content)
    with pytest.raises(DataError, match="expected sha256"):
        ShardFile(folder, manifest, 0)
    unhashed = ShardFile(folder, manifest, 0, hashed=False)
    with pytest.raises(DataError, match=r"document 3, byte \d+: expected an id below 320"):
        unhashed.read_into(np.empty(int(unhashed._starts[5]), np.int64), 0)


class _Evil:
    def __reduce__(self) -> Any:
        return (Path.write_text, (Path("pwned"), "x"))


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


GOOD = _npy(np.arange(5))
HOSTILE: dict[str, tuple[bytes, str]] = {
    "objects": (_npy(np.array([_Evil(), _Evil()], object)), "has 1 dimensions of |O"),
    "pickle": (pickle.dumps(_Evil()), "is not a .npy file of token ids"),
    "floats": (_npy(np.arange(5.0)), "dimensions of <f8"),
    "big-endian": (_npy(np.arange(5, dtype=">i4")), "dimensions of >i4"),
    "table": (_npy(np.zeros((2, 3), np.int64)), "has 2 dimensions of <i8"),
    "cut": (GOOD[:-3], "expected 168 bytes, actual 165"),
    "longer": (GOOD + b"x", "expected 168 bytes, actual 169"),
    "empty": (b"", "is not a .npy file of token ids"),
    "header that runs": (GOOD.replace(b"(5,)", b"9**9"), "is not a .npy file of token ids"),
    "header that claims much": (b"\x93NUMPY\x01\x00\xff\xff" + b" " * 600, "is not a .npy file of token ids"),
    "negative": (_npy(np.array([5, -1])), "token id"),
    "large": (_npy(np.array([5, 320])), "has token id 320"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_arrays_are_refused(
    tmp_path: Path, tokenizer: Tokenizer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content, says = HOSTILE[name]
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "data" / "a.tar", "w") as tar:
        for key, member in (("0", GOOD), ("1", content)):
            about = tarfile.TarInfo(f"{key}.npy")
            about.size = len(member)
            tar.addfile(about, io.BytesIO(member))
    with pytest.raises(DataError) as raised:
        index_folder(tmp_path / "data", tokenizer)
    assert says in str(raised.value) and not (tmp_path / "pwned").exists()
    assert not (tmp_path / "data" / "manifest.json").exists()


def test_types_that_differ_are_refused(tmp_path: Path, documents: list[np.ndarray], tokenizer: Tokenizer) -> None:
    write_arrays(tmp_path / "data", documents, "int64")
    write_arrays(tmp_path / "more", documents, "int32")
    (tmp_path / "more" / "part-0.tar").rename(tmp_path / "data" / "part-2.tar")
    with pytest.raises(DataError, match=r"of several types, uint64 in part-1\.tar and uint32 in part-2\.tar"):
        index_folder(tmp_path / "data", tokenizer)


def _spoil(place: int, value: bytes) -> Callable[[bytes], bytes]:
    return lambda content: content[:place] + value + content[place + len(value) :]


INDEXES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "magic": (_spoil(0, b"X"), "is no index of a Megatron data set"),
    "short": (lambda content: content[:20], "is no index of a Megatron data set"),
    "version": (_spoil(9, b"\x02"), "version 2"),
    "floats": (_spoil(17, b"\x07"), "its type has the code 7"),
    "many sequences": (_spoil(18, b"\xff" * 8), "expected"),
    "cut": (lambda content: content[:-8], "expected"),
    "none": (lambda content: content[:18] + bytes(8) + (1).to_bytes(8, "little") + bytes(8), "has no sequences"),
    "length": (_spoil(34, b"\xff\xff\xff\xff"), "its places are not those"),
    "place": (
        lambda content: _spoil(34 + 4 * int.from_bytes(content[18:26], "little") + 8, b"\x01")(content),
        "places",
    ),
    "bounds": (lambda content: content[:-8] + (10**9).to_bytes(8, "little"), "its places are not those"),
}


@pytest.mark.parametrize("name", INDEXES)
def test_hostile_indexes_are_refused(
    tmp_path: Path, documents: list[np.ndarray], tokenizer: Tokenizer, name: str
) -> None:
    write_megatron(tmp_path / "data", documents, np.int32)
    change, says = INDEXES[name]
    index = tmp_path / "data" / "part-1.idx"
    index.write_bytes(change(index.read_bytes()))
    with pytest.raises(DataError, match=says):
        index_folder(tmp_path / "data", tokenizer)


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.mark.parametrize("suffix", ["txt", "json"])
def test_text_is_sent_where_it_is_tokenized_and_trained_from_there(
    tmp_path: Path, documents: list[np.ndarray], tokenizer: Tokenizer, suffix: str
) -> None:
    """The command that the refusal names, as it stands there."""
    (tmp_path / "data").mkdir()
    with webdataset.TarWriter(str(tmp_path / "data" / "a.tar")) as writer:
        for number, text in enumerate(TEXTS):
            writer.write({"__key__": str(number), suffix: text if suffix == "txt" else {"text": text}})
    result = command("index", tmp_path / "data")
    assert isinstance(result.exception, DataError) and f"It has text (.{suffix})" in str(result.exception)
    said = str(result.exception).partition("`llmtrain data ")[2].partition("`")[0]
    words = shlex.split(said.replace("OUT", str(tmp_path / "out")).replace("MODEL", str(tokenizer.path)))
    assert command(*words, "--valid-fraction", 0).exit_code == 0
    assert sorted(read_back(tmp_path / "out" / "train")) == sorted(document.tolist() for document in documents)


def test_a_folder_of_others_is_indexed_by_the_command(
    tmp_path: Path, documents: list[np.ndarray], tokenizer: Tokenizer
) -> None:
    write_megatron(tmp_path / "data", documents, np.uint16, tokenizer.eos_id)
    result = command("index", tmp_path / "data", "--tokenizer", tokenizer.path)
    assert result.exit_code == 0 and "indexed 2 shards of uint16, 60 documents, of which 60 bring" in result.stderr
    (tmp_path / "data" / "tokenizer.model").write_bytes(tokenizer.path.read_bytes())
    assert "60 documents" in command("inspect", tmp_path / "data", "--seq-len", 32).stdout
    assert command("verify", tmp_path / "data").exit_code == 0
    assert "text " in command("show", tmp_path / "data", "--seq-len", 64).stdout
    (tmp_path / "mds").mkdir()
    (tmp_path / "mds" / "shard.00000.mds.zstd").write_bytes(b"")
    assert "MosaicML's, which are not read" in str(command("index", tmp_path / "mds").exception)
