import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipelines.dataset_writer import ShardingConfig, work_folder
from data_pipelines.inspection import datasets_in, verify_dataset
from data_pipelines.sharding import split_documents, write_shards
from data_pipelines.tokenizer import train_tokenizer
from llmtrain.data.storage.manifest import read_manifest
from llmtrain.data.storage.shard_file import ShardFile
from llmtrain.data.tokenizer import SentencePieceTokenizer
from llmtrain.errors import ConfigError, DataError

DOCUMENTS = [f"document {number}\n" + f"    line {number * 7}\n" * (number % 9) for number in range(200)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    return train_tokenizer(DOCUMENTS, tmp_path_factory.mktemp("tokenizer") / "t.model", 320)


def in_valid(texts: list[str], fraction: float) -> set[str]:
    return {text for split, text in split_documents(texts, fraction) if split == "valid"}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def texts_in(folder: Path, tokenizer: SentencePieceTokenizer) -> list[str]:
    manifest = read_manifest(folder)
    shards = [ShardFile(folder, manifest, number) for number in range(len(manifest.shards))]
    return [tokenizer.decode(shard.document(n).tolist()) for shard in shards for n in range(shard.num_documents)]


def test_every_document_is_in_exactly_one_split_as_it_was(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    manifests = write_shards(DOCUMENTS, tmp_path / "out", tokenizer, ShardingConfig(shard_tokens=1000))
    assert len(manifests["train"].shards) > 3
    for split, manifest in manifests.items():
        folder = tmp_path / "out" / split
        assert read_manifest(folder) == manifest
        assert verify_dataset(folder) == []
        assert texts_in(folder, tokenizer) == [
            d for d in DOCUMENTS if (d in in_valid(DOCUMENTS, 0.1)) == (split == "valid")
        ]
        assert all(entry.tokens >= 1000 for entry in manifest.shards[:-1])
    assert 5 < manifests["valid"].num_documents < 40
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == tokenizer.path.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_result_does_not_depend_on_the_number_of_workers(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(DOCUMENTS, tmp_path / "one", tokenizer, ShardingConfig(num_workers=1))
    monkeypatch.setattr("data_pipelines.cutting._BATCH_CHARACTERS", 500)
    write_shards(iter(DOCUMENTS), tmp_path / "three", tokenizer, ShardingConfig(num_workers=3))
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_split_depends_on_content_only() -> None:
    texts = [f"text {number}" for number in range(4000)]
    assert len(in_valid(texts, 0.25)) / 4000 == pytest.approx(0.25, abs=0.03)
    assert in_valid(texts[::2], 0.25) == in_valid(texts, 0.25) & set(texts[::2])
    assert in_valid(texts, 0.1) < in_valid(texts, 0.3)


@pytest.mark.parametrize("fraction", [1.0, -1.0, float("nan")])
def test_fraction_outside_is_refused(tmp_path: Path, tokenizer: SentencePieceTokenizer, fraction: float) -> None:
    with pytest.raises(ConfigError, match="--valid-fraction"):
        write_shards(DOCUMENTS, tmp_path / "out", tokenizer, ShardingConfig(valid_fraction=fraction))


def test_empty_split_is_refused_and_leaves_nothing(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    for documents in (DOCUMENTS[:1], []):
        with pytest.raises(ConfigError, match=r"of \d documents.*give more of them"):
            write_shards(documents, tmp_path / "out", tokenizer, ShardingConfig())
    assert not list(tmp_path.iterdir())


def test_one_document_is_refused_before_it_is_tokenized(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode_batch(texts: object, num_threads: int = 1) -> None:
        raise AssertionError("tokenized")

    monkeypatch.setattr(tokenizer, "encode_batch", encode_batch)
    for documents in (DOCUMENTS[:1], [DOCUMENTS[0]] * 3, []):
        with pytest.raises(ConfigError, match=r"--separator.*--valid-fraction 0"):
            write_shards(documents, tmp_path / "out", tokenizer, ShardingConfig())


@pytest.mark.parametrize("fraction", [1e-9, 0.1, 0.999_999])
def test_few_documents_still_make_two_splits(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, fraction: float
) -> None:
    few = [text for text in DOCUMENTS if text not in in_valid(DOCUMENTS, 0.1)][:3]
    few.append(few[0])
    manifests = write_shards(few, tmp_path / "out", tokenizer, ShardingConfig(valid_fraction=fraction))
    counts = {split: manifest.num_documents for split, manifest in manifests.items()}
    assert sum(counts.values()) == 4 and min(counts.values()) >= 1
    texts = {split: set(texts_in(tmp_path / "out" / split, tokenizer)) for split in counts}
    assert not texts["train"] & texts["valid"]
    assert set(split_documents(few, fraction)) == set(split_documents(reversed(few), fraction))


def test_without_a_valid_split_one_document_is_enough(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    config = ShardingConfig(valid_fraction=0, overwrite=True)
    write_shards(DOCUMENTS, tmp_path / "out", tokenizer, ShardingConfig())
    manifests = write_shards(DOCUMENTS[:1], tmp_path / "out", tokenizer, config)
    assert list(manifests) == ["train"] and manifests["train"].num_documents == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["tokenizer.model", "train"]
    assert datasets_in(tmp_path / "out") == [tmp_path / "out" / "train"]
    assert verify_dataset(tmp_path / "out" / "train") == []
    with pytest.raises(ConfigError, match="no document"):
        write_shards([], tmp_path / "none", tokenizer, config)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_half_way_leaves_nothing(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, number: signal.Signals
) -> None:
    before = signal.getsignal(number)

    def stopped() -> Iterator[str]:
        yield from DOCUMENTS
        assert [path.name for path in tmp_path.iterdir()] == [f".out.writing-{os.getpid()}"]
        os.kill(os.getpid(), number)
        yield DOCUMENTS[0]

    with pytest.raises(SystemExit) as ended:
        write_shards(stopped(), tmp_path / "out", tokenizer, ShardingConfig())
    assert ended.value.code == 128 + number
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(number) == before


def test_what_a_killed_writer_left_is_cleared_by_the_next_and_what_one_writes_is_not(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    abandoned = tmp_path / ".o[u]t.writing-12345"
    (abandoned / "train").mkdir(parents=True)
    other, link = tmp_path / ".other.writing-1", tmp_path / ".o[u]t.writing-2"
    other.mkdir()
    link.symlink_to(other)
    with work_folder(tmp_path / "out") as held:
        (held / "file").touch()
        held.rename(tmp_path / ".o[u]t.writing-3")
        write_shards(DOCUMENTS, tmp_path / "o[u]t", tokenizer, ShardingConfig())
        assert (tmp_path / ".o[u]t.writing-3" / "file").exists()
    assert not abandoned.exists() and other.exists() and link.is_symlink()
    assert capsys.readouterr().err.count("removed ") == 1


def test_failure_half_way_leaves_nothing(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    def broken() -> Iterator[str]:
        yield from DOCUMENTS
        raise DataError("a broken line")

    with pytest.raises(DataError, match="a broken line"):
        write_shards(broken(), tmp_path / "out", tokenizer, ShardingConfig())
    assert not list(tmp_path.iterdir())


def test_the_tokenizer_may_lie_where_the_shards_go(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.model").write_bytes(tokenizer.path.read_bytes())
    write_shards(DOCUMENTS, out, tokenizer, ShardingConfig())
    assert sorted(path.name for path in out.iterdir()) == ["mine.model", "tokenizer.model", "train", "valid"]
    assert (out / "mine.model").read_bytes() == tokenizer.path.read_bytes()
    write_shards(DOCUMENTS, out, tokenizer, ShardingConfig(overwrite=True))
    assert (out / "mine.model").read_bytes() == tokenizer.path.read_bytes()
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.model").write_bytes(b"another one")
    with pytest.raises(ConfigError, match="is not empty"):
        write_shards(DOCUMENTS, other, tokenizer, ShardingConfig())
    assert (other / "tokenizer.model").read_bytes() == b"another one"


def test_only_shards_are_ever_overwritten(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_shards(DOCUMENTS, out, tokenizer, ShardingConfig())  # an empty folder is fine
    before = contents(out)
    with pytest.raises(ConfigError, match="--overwrite"):
        write_shards(DOCUMENTS[:100], out, tokenizer, ShardingConfig())
    assert contents(out) == before
    write_shards(DOCUMENTS[:100], out, tokenizer, ShardingConfig(overwrite=True))
    assert read_manifest(out / "train").num_documents < 100
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="holds no shards"):
        write_shards(DOCUMENTS, precious, tokenizer, ShardingConfig(overwrite=True))
    assert (precious / "thesis.txt").read_text() == "years of work"
    with pytest.raises(ConfigError, match="is a file"):
        write_shards(DOCUMENTS, precious / "thesis.txt", tokenizer, ShardingConfig(overwrite=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "precious"]
