"""Long texts are tokenized piece by piece: the same ids, and memory that does not grow with the tokenizer's needs."""

import random
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from data_pipelines import cutting
from data_pipelines import tokenizer as tokenizer_module
from data_pipelines.cutting import Cutter, tokenized
from data_pipelines.tokenizer import train_tokenizer
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.values.tokenizer import Tokenizer

WORDS = [
    "def ",
    "return x",
    "é",
    "中文字",
    "\n",
    "\n\n",
    "    ",
    " ",
    "  ",
    "▁",
    "naïve",
    "123",
    ".",
    "e\u0301",
    "\t",
    "🙂",
    "İ",
]


def text_of(seed: int, count: int) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice(["", " ", "\n"]) for _ in range(count))


def byte_level(folder: Path, add_prefix_space: bool = False) -> Tokenizer:
    """A tokenizer.json as GPT-2 has it, with a normalizer that joins characters."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([text_of(seed, 200) for seed in range(5)], trainer)
    path = folder / f"{add_prefix_space}.json"
    tokenizer.save(str(path))
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.mark.parametrize("kind", ["bpe", "unigram", "dummy_prefix", "byte_level", "prefix_space"])
def test_pieces_have_the_ids_of_the_whole(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [text_of(seed, 200) for seed in range(5)]
    if kind in ("bpe", "unigram", "dummy_prefix"):
        settings = tokenizer_module._settings(0) | {"add_dummy_prefix": kind == "dummy_prefix"}
        monkeypatch.setattr(tokenizer_module, "_settings", lambda _: settings)
        found = train_tokenizer(texts, folder / f"{kind}.model", 330, "unigram" if kind == "unigram" else "bpe")
        tokenizer: Tokenizer = found
    else:
        tokenizer = byte_level(folder, kind == "prefix_space")
    monkeypatch.setattr(cutting, "LONGEST_PIECE", 40)
    monkeypatch.setattr(cutting, "_AROUND", 30)
    counts = []
    for seed in range(30):
        text = text_of(100 + seed, 150)
        pieces = list(Cutter(tokenizer).pieces(text))
        counts.append(len(pieces))
        assert "".join(pieces) == text
        ((tag, ids),) = tokenized([("t", text)], tokenizer, 1)
        assert (tag, ids.tolist()) == ("t", tokenizer.encode(text)), seed
        assert ids.dtype == np.uint16
    if kind == "dummy_prefix":  # a space before each piece would be a token more: such texts stay whole
        assert set(counts) == {1}
    else:
        assert sum(counts) > 30 * 5


def test_a_vocabulary_whose_tokens_cross_words_is_not_cut_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "LONGEST_PIECE", 40)
    tokenizer = byte_level(folder)
    assert len(list(Cutter(tokenizer).pieces("ab cd " * 50))) > 3
    crossing = [*tokenizer.pieces[:-1], "b\u0120c"]
    monkeypatch.setattr(type(tokenizer), "pieces", property(lambda self: crossing))
    assert list(Cutter(tokenizer).pieces("ab cd " * 50)) == ["ab cd " * 50]


MEASURED = """
import resource, sys
from pathlib import Path
from data_pipelines.reading.inputs import ReadReport
from data_pipelines.reading.documents import iter_documents
from data_pipelines.dataset_writer import ShardingConfig
from data_pipelines.sharding import write_shards
from llmtrain.data.tokenizer import load_tokenizer
folder = Path(sys.argv[1])
tokenizer = load_tokenizer(folder / "False.json")
for name in ("small", "large"):
    write_shards(iter_documents([folder / name], ReadReport()), folder / f"out-{name}", tokenizer, ShardingConfig(0.5))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_memory_for_a_large_document_is_a_few_bytes_per_byte(folder: Path, tmp_path: Path) -> None:
    """In a process of its own, behind a small data set that has loaded everything. It was 150 bytes for each byte."""
    byte_level(folder).path.rename(tmp_path / "False.json")
    line = "Peak memory, measured on ordinary words and 12 numbers.\n"
    for name, size_bytes in (("small", 10_000), ("large", 8_000_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(line * (size_bytes // len(line)))
        for number in range(20):
            (tmp_path / name / f"{number}.txt").write_text(f"{number}")
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path)], capture_output=True, text=True, timeout=300, check=True
    )
    before, after = map(int, done.stdout.split())
    assert resource.getrlimit(resource.RLIMIT_AS)  # the unit above is that of Linux
    # The batch of pieces at hand takes up to 40 MB, whatever the size of the document.
    assert after - before < 15 * 8_000_000 + 40_000_000
