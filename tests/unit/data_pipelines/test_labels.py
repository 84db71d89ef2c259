"""`llmtrain data labels` as a user runs it: three tasks, tables and JSON lines, and what is wrong with some."""

import gzip
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from data_pipelines.labelled.framing import Frame, first_pieces, shortened
from llmtrain.cli.data import app
from llmtrain.data.storage.manifest import Manifest, read_manifest
from llmtrain.data.storage.shard_file import ShardFile
from llmtrain.data.storage.targets import NO_LABEL
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.errors import ConfigError, DataError
from tests.support.chats import sentencepiece_file

TEXTS = [f"the {word} of {number} answers" for number in range(12) for word in ("list", "file", "name")]
CONTEXT = "The archive keeps seven copies of every file."
QUESTION = {"question": "How many copies?", "context": CONTEXT, "answers": {"text": ["seven"], "answer_start": [18]}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sentencepiece_file(tmp_path_factory.mktemp("tokenizer") / "t.model")


def labels(tokenizer: Path, out: Path, task: str, content: str, *more: object, name: str = "f.jsonl") -> Result:
    file = out.parent / name
    file.write_text(content, "utf-8")
    arguments = ("labels", file, out, "--tokenizer", tokenizer, "--task", task, *more)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def lines(*items: Any) -> str:
    return "".join(f"{json.dumps(item, ensure_ascii=False)}\n" for item in items)


def documents(folder: Path) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of all documents of a split."""
    manifest = read_manifest(folder)
    found = []
    for number in range(len(manifest.shards)):
        shard = ShardFile(folder, manifest, number, hashed=True)
        for document in range(shard.num_documents):
            begin = int(shard._starts[document])
            ids = np.empty(int(shard.lengths[document]), np.int64)
            shard.read_into(ids, begin)
            found.append((ids.tolist(), shard.targets(document).tolist()))
    return found


def record_of(manifest: Manifest) -> Any:
    assert manifest.labels is not None
    return manifest.labels


def test_texts_with_one_label(tokenizer: Path, tmp_path: Path) -> None:
    items = [{"text": text, "label": ("b", "a", "c")[number % 3]} for number, text in enumerate(TEXTS)]
    result = labels(tokenizer, tmp_path / "out", "classification", lines(*items), "--valid-fraction", "0.3")
    assert result.exit_code == 0, result.output
    loaded = load_tokenizer(tokenizer)
    expected = {item["text"]: item["label"] for item in items}
    counts = {"a": 0, "b": 0, "c": 0}
    for split in ("train", "valid"):
        record = record_of(read_manifest(tmp_path / "out" / split))
        assert (record.task, record.names, record.family, record.separator_id) == (
            "classification", ("a", "b", "c"), "encoder", None,
        )  # fmt: skip
        for ids, (label,) in documents(tmp_path / "out" / split):
            assert (ids[0], ids[-1]) == (loaded.cls_id, loaded.sep_id)
            text = loaded.decode(ids[1:-1])
            assert expected.pop(text) == record.names[label]
        for name, count in zip(record.names, record.counts, strict=True):
            counts[name] += count
    assert not expected and counts == {"a": 12, "b": 12, "c": 12}


@pytest.mark.parametrize("name", ["t.csv", "t.tsv"])
def test_tables_and_numbers(tokenizer: Path, tmp_path: Path, name: str) -> None:
    mark = "," if name == "t.csv" else "\t"
    rows = [f'"one{mark} two"', "three", '"four\nfive"']
    content = f"note{mark}stars{mark}body\n" + "".join(f"x{mark}{10 - n}{mark}{row}\n" for n, row in enumerate(rows))
    keys = ("--text-key", "body", "--label-key", "stars", "--valid-fraction", "0", "--family", "decoder")
    result = labels(tokenizer, tmp_path / "out", "classification", content, *keys, name=name)
    assert result.exit_code == 0, result.output
    loaded, record = load_tokenizer(tokenizer), record_of(read_manifest(tmp_path / "out" / "train"))
    assert (record.names, record.family) == (("8", "9", "10"), "decoder")  # by size, not by spelling
    found = {loaded.decode(ids): record.names[label] for ids, (label,) in documents(tmp_path / "out" / "train")}
    assert found == {f"one{mark} two": "10", "three": "9", "four\nfive": "8"}


def test_pairs_have_a_separator_and_lose_their_ends_where_they_are_longest(tokenizer: Path, tmp_path: Path) -> None:
    items = [{"a": "a short one", "b": TEXTS[0] + " " + TEXTS[1], "label": n % 2} for n in range(2)]
    keys = ("--text-key", "a", "--text-b-key", "b", "--valid-fraction", "0", "--max-tokens", 16)
    result = labels(tokenizer, tmp_path / "no", "classification", lines(*items), *keys)
    assert isinstance(result.exception, DataError) and "f.jsonl:1: has " in str(result.exception)
    result = labels(tokenizer, tmp_path / "out", "classification", lines(*items), *keys, "--too-long", "truncate")
    assert result.exit_code == 0, result.output
    loaded = load_tokenizer(tokenizer)
    assert record_of(read_manifest(tmp_path / "out" / "train")).separator_id == loaded.sep_id
    for ids, _ in documents(tmp_path / "out" / "train"):
        assert len(ids) == 16 and ids[-1] == loaded.sep_id
        first = ids.index(loaded.sep_id)
        assert 6 <= first <= 8  # both have lost, the longer one more
        assert "a short one".startswith(loaded.decode(ids[1:first]))
        assert items[0]["b"].startswith(loaded.decode(ids[first + 1 : -1]))
    content = lines(*items, {"a": "x", "b": "y", "label": 1})
    dropped = labels(tokenizer, tmp_path / "d", "classification", content, *keys, "--too-long", "drop")
    assert dropped.exit_code == 0 and "left out 2 texts of more than 16 tokens" in dropped.output


def test_words_have_their_tag_at_their_first_token(tokenizer: Path, tmp_path: Path) -> None:
    words, tags = (
        ["Ada", "Lovelace", "answered", "unforeseeable", "questions", "."],
        ["B-PER", "I-PER", "O", "O", "O", "O"],
    )
    content = lines({"words": words, "tags": tags}, {"words": " ".join(words), "tags": " ".join(tags)})
    result = labels(tokenizer, tmp_path / "out", "tagging", content, "--valid-fraction", "0")
    assert result.exit_code == 0, result.output
    loaded, record = load_tokenizer(tokenizer), record_of(read_manifest(tmp_path / "out" / "train"))
    assert record.names == ("O", "B-PER", "I-PER") and record.counts == (8, 2, 2)
    for ids, targets in documents(tmp_path / "out" / "train"):
        at = [place for place, target in enumerate(targets) if target != NO_LABEL]
        assert [record.names[targets[place]] for place in at] == tags
        begins = [*at, len(ids) - 1]
        spelled = [loaded.decode(ids[a:b]).strip() for a, b in pairwise(begins)]
        assert spelled == words
        assert len(ids) > len(words) + 2, "some word has several tokens"


def test_an_answer_is_found_by_its_characters(tokenizer: Path, tmp_path: Path) -> None:
    other = {**QUESTION, "context": "é " + CONTEXT, "answers": [{"text": "every file", "answer_start": 36}]}
    result = labels(tokenizer, tmp_path / "out", "qa", lines(QUESTION, other), "--valid-fraction", "0")
    assert result.exit_code == 0, result.output
    loaded = load_tokenizer(tokenizer)
    said = {loaded.decode(ids[begin:end]).strip() for ids, (begin, end) in documents(tmp_path / "out" / "train")}
    assert said == {"seven", "every file"}
    for ids, (begin, _) in documents(tmp_path / "out" / "train"):
        assert begin > ids.index(loaded.sep_id) and ids.count(loaded.sep_id) == 2


ONE, TWO = {"text": "x", "label": "a"}, {"text": "y", "label": "b"}
WRONG: list[tuple[str, str, tuple[str, ...], str]] = [
    ("classification", lines(ONE, {"text": "", "label": "b"}), (), "f.jsonl:2: text is empty"),
    ("classification", lines(ONE, {"text": 5, "label": "b"}), (), "f.jsonl:2: text is a number, not a text"),
    ("classification", lines(ONE, {"label": "b"}), (), "f.jsonl:2: has no text; its keys are label. --text-key"),
    ("classification", lines(ONE, {"text": "y", "label": 1.5}), (), "f.jsonl:2: label = 1.5: a label is a name"),
    ("classification", lines(ONE, ONE), (), "all records have the label a: nothing is to be told apart"),
    ("classification", lines(ONE) + "{\n", (), "f.jsonl:2: not JSON"),
    ("classification", lines(ONE, ["x"]), (), "f.jsonl:2: is a list, not an object"),
    ("classification", "", (), "f.jsonl: there is no record in it"),
    ("classification", lines(ONE, TWO), ("--too-long", "drop"), "--too-long drop: has no effect without --max-tokens"),
    ("tagging", lines({"words": ["a", "b", "c"], "tags": ["O", "B-X"]}), (), "f.jsonl:1: has 3 words and 2 tags"),
    (
        "tagging",
        lines({"words": ["a", ""], "tags": ["O", "B-X"]}),
        (),
        "f.jsonl:1: words must be a list of texts, none",
    ),
    ("tagging", lines({"words": [], "tags": ["O", "B-X"]}), (), "f.jsonl:1: words is empty"),
    ("tagging", lines(ONE, TWO), ("--text-b-key", "x"), "words and tags are of one text"),
    ("qa", lines({**QUESTION, "answers": {"text": [], "answer_start": []}}), (), "f.jsonl:1: has no answer"),
    ("qa", lines({**QUESTION, "answers": {"text": ["seven"], "answer_start": [3]}}), (), "it begins at 18"),
    ("qa", lines({**QUESTION, "answers": {"text": ["ten"], "answer_start": [3]}}), (), "it is not in the context"),
    ("qa", lines({**QUESTION, "answers": "seven"}), (), "answers must be an object with text and answer_start"),
    ("qa", lines(QUESTION), ("--family", "decoder"), "a decoder sees one"),
    ("qa", lines(QUESTION), ("--max-tokens", "9", "--too-long", "truncate"), "would cut answers"),
    (
        "qa",
        lines(QUESTION),
        ("--max-tokens", "9"),
        "--max-tokens is 9. Give --too-long drop, or a larger --max-tokens.",
    ),
]


@pytest.mark.parametrize(("task", "content", "more", "says"), WRONG)
def test_what_is_wrong_is_explained(
    tokenizer: Path, tmp_path: Path, task: str, content: str, more: tuple[str, ...], says: str
) -> None:
    result = labels(tokenizer, tmp_path / "out", task, content, "--valid-fraction", "0", *more)
    assert isinstance(result.exception, DataError | ConfigError), result.output
    assert says in str(result.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a,a\n", "t.csv:1: the header has 'a' twice"),
        ("text,label\nx,y,z\n", "t.csv:2: has 3 cells, and the header 2"),
        ('text,label\n"x,y\n', "not a table in UTF-8"),
    ],
)
def test_what_is_wrong_with_a_table_is_explained(tokenizer: Path, tmp_path: Path, content: str, says: str) -> None:
    result = labels(tokenizer, tmp_path / "out", "classification", content, name="t.csv")
    assert isinstance(result.exception, DataError)
    assert says in str(result.exception)


def test_labels_like_those_of_another_data_set(tokenizer: Path, tmp_path: Path) -> None:
    content = lines(ONE, TWO, {"text": "z", "label": "cc"})
    assert labels(tokenizer, tmp_path / "first", "classification", content, "--valid-fraction", "0").exit_code == 0
    like = ("--like", tmp_path / "first" / "train", "--valid-fraction", "0")
    result = labels(tokenizer, tmp_path / "second", "classification", lines(TWO), *like)
    assert result.exit_code == 0, result.output
    assert record_of(read_manifest(tmp_path / "second" / "train")).names == ("a", "b", "cc")
    assert documents(tmp_path / "second" / "train")[0][1] == [1]
    unknown = labels(tokenizer, tmp_path / "third", "classification", lines(ONE, {"text": "z", "label": "c"}), *like)
    assert str(unknown.exception).endswith("f.jsonl:2: the label 'c' is none of the 3 known ones. Try cc.")
    other = labels(tokenizer, tmp_path / "third", "tagging", lines({"words": ["a"], "tags": ["a"]}), *like)
    assert "has labels of classification, and --task is tagging" in str(other.exception)


def test_packed_files_are_read(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "f.csv.gz").write_bytes(gzip.compress(b"text,label\nx,a\ny,b\n"))
    arguments = [
        "labels",
        tmp_path / "f.csv.gz",
        tmp_path / "out",
        "--tokenizer",
        tokenizer,
        "--task",
        "classification",
    ]
    result = CliRunner().invoke(app, [*map(str, arguments), "--valid-fraction", "0"])
    assert result.exit_code == 0, result.output
    assert len(documents(tmp_path / "out" / "train")) == 2


def test_texts_are_shortened_as_transformers_does() -> None:
    assert shortened([[1, 2, 3], [4, 5, 6, 7, 8]], 5) == [[1, 2, 3], [4, 5]]
    assert shortened([[1, 2, 3], [4, 5, 6]], 4) == [[1, 2], [4, 5]]
    assert shortened([[1], [2]], 9) == [[1], [2]]


def test_words_that_have_no_piece_of_their_own_are_known(tokenizer: Path) -> None:
    frame = Frame(load_tokenizer(tokenizer), "encoder")
    encoded = frame.encode("one two")
    joined = type(encoded)([1], [(0, 7)])  # a piece of both words
    assert first_pieces(["one", "two"], joined) == [0, None]
    assert None not in first_pieces(["one", "two"], encoded)
