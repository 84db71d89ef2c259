"""A pipeline's result: what it holds, that it is the same however it was done, and what it refuses."""

import io
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from data_pipelines.documents import Document
from data_pipelines.inspection import verify_dataset
from data_pipelines.pipeline.executors import InThisProcess, Processes
from data_pipelines.pipeline.progress import Progress
from data_pipelines.pipeline.run import run_pipeline
from data_pipelines.sharding import place_of
from data_pipelines.steps.length import Length
from llmtrain.config.reading.pipeline import load_pipeline
from llmtrain.data.storage.manifest import read_manifest
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.errors import ConfigError, DataError, LlmtrainError, RunFolderInUseError
from llmtrain.runs.folder import RunFolder
from tests.support.collections import (
    documents_of,
    run_quietly,
    shard_documents,
    source_texts,
    tree_hash,
    write_collection,
    write_pipeline,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a collection, a pipeline and its result, which nobody changes."""
    folder = tmp_path_factory.mktemp("pipeline")
    write_collection(folder)
    run_quietly(write_pipeline(folder, write={"shard_tokens": 30_000, "valid_fraction": 0.1, "documents": True}))
    return folder


@pytest.fixture
def collection(finished: Path, tmp_path: Path) -> Path:
    """A copy of the collection alone."""
    shutil.copytree(finished / "raw", tmp_path / "raw")
    return tmp_path


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "corpus" / "summary.json").read_text())


def test_every_document_comes_out_once_but_duplicates_and_what_is_broken(finished: Path) -> None:
    result = finished / "out" / "corpus"
    documents = documents_of(result)
    texts = source_texts(40)
    # The two that were planted are gone, and so is what the standard library has twice.
    names = [document["id"] for document in documents]
    assert "the same" not in names and "nearly the same" not in names
    summary = summary_of(finished)
    removed = {step["name"]: sum(step["dropped"].values()) for step in summary["steps"]}
    assert removed["exact_dedup"] == 1 and removed["near_dedup"] >= 1
    assert len(documents) == 42 - sum(removed.values())
    assert [source["documents"] for source in summary["sources"]] == [20, 22]
    assert summary["sources"][1]["left_out"] == {"not_json": 1}
    assert summary["sources"][1]["examples"]["not_json"] == [f"{finished}/raw/rows.jsonl:4"]
    assert documents[0]["text"].split() == texts[0].split() and documents[0]["source"] == "text"


def test_shards_hold_the_documents_in_a_drawn_order(finished: Path) -> None:
    result = finished / "out" / "corpus"
    tokenizer = load_tokenizer(result / "tokenizer.model")
    texts = [document["text"] for document in documents_of(result)]
    found: dict[str, list[str]] = {}
    for split in ("train", "valid"):
        assert verify_dataset(result / split) == []
        manifest = read_manifest(result / split)
        assert manifest.lossy is False and all(shard.tokens >= 30_000 for shard in manifest.shards[:-1])
        found[split] = [tokenizer.decode(ids) for ids in shard_documents(result / split)]
        bound = int(0.1 * 2**64)
        assert all((place_of(text) < bound) == (split == "valid") for text in found[split])
        kept = [text for text in texts if (place_of(text) < bound) == (split == "valid")]
        assert sorted(found[split]) == sorted(kept) and len(kept) > 1
    assert len(read_manifest(result / "train").shards) > 2
    assert found["train"] != [text for text in texts if text in set(found["train"])]  # shuffled
    numbers = summary_of(finished)["splits"]
    assert numbers["train"]["documents"] == len(found["train"])


@pytest.mark.parametrize("workers", [2, 4])
def test_the_result_is_the_same_for_any_number_of_processes(finished: Path, workers: int, tmp_path: Path) -> None:
    config = load_pipeline(finished / "pipeline.yaml", [f"output_dir={tmp_path}"]).config
    processes = Processes(workers)
    try:
        result = run_quietly(config, processes)
    finally:
        processes.close()
    assert tree_hash(result) == tree_hash(finished / "out" / "corpus")


def test_a_finished_pipeline_does_nothing_and_a_deleted_result_comes_back(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "copy", symlinks=True)
    config = load_pipeline(finished / "pipeline.yaml", [f"output_dir={tmp_path / 'copy' / 'out'}"]).config
    result = tmp_path / "copy" / "out" / "corpus"
    expected = tree_hash(result)
    times = {path: path.stat().st_mtime_ns for path in result.rglob("*") if "train" in str(path)}
    run_quietly(config)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    shutil.rmtree(result / "train")
    run_quietly(config)
    assert tree_hash(result) == expected


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": 5}, ["seed: was 1234, is 5"]),
        ({"steps": ["normalize"]}, ["steps: was"]),
        ({"chunk_bytes": 1_000_000}, ["chunk_bytes: was 60000, is 1000000"]),
        ({"write": {"shard_tokens": 7, "valid_fraction": 0.1}}, ["write.shard_tokens: was 30000, is 7"]),
    ],
)
def test_another_pipeline_on_the_same_folder_is_refused_with_what_differs(
    finished: Path, changes: dict[str, Any], says: list[str]
) -> None:
    base = {"write": {"shard_tokens": 30_000, "valid_fraction": 0.1, "documents": True}, **changes}
    before = (finished / "pipeline.yaml").read_text()
    try:
        with pytest.raises(ConfigError) as error:
            run_quietly(write_pipeline(finished, **base))
    finally:
        (finished / "pipeline.yaml").write_text(before)
    for text in says:
        assert text in str(error.value)


def test_other_inputs_are_refused_by_name_and_a_touched_one_is_not(collection: Path) -> None:
    pipeline = write_pipeline(collection, tokenizer=None, steps=["normalize"])
    result = run_quietly(pipeline)
    expected = tree_hash(result)
    rows, first = collection / "raw" / "rows.jsonl", collection / "raw" / "text" / "000.txt"
    rows.touch()
    (result / "summary.json").unlink()
    assert tree_hash(run_quietly(pipeline)) == expected
    first.write_text(first.read_text() + "more")
    (collection / "raw" / "text" / "new.txt").write_text("a new one")
    (collection / "raw" / "text" / "003.txt").unlink()
    with pytest.raises(ConfigError) as error:
        run_quietly(pipeline)
    for text in (f"{first}: was", "new.txt: is new", "003.txt: is missing"):
        assert text in str(error.value)
    assert "rows.jsonl" not in str(error.value)


@pytest.mark.parametrize(
    "ending", [".jsonl.zst", ".keys", ".signatures", ".edges", ".removed", ".rows", ".tokens", ".tar"]
)
def test_a_damaged_intermediate_file_is_written_again(finished: Path, ending: str, tmp_path: Path) -> None:
    """Whatever was damaged: what a reader finds changed is made anew, and the result is the same."""
    overrides = [f"output_dir={tmp_path}", "run.keep_work=true"]
    config = load_pipeline(finished / "pipeline.yaml", overrides).config
    result = run_quietly(config)
    damaged = 0
    for path in sorted((result / "work").rglob(f"*{ending}")):
        content = bytearray(path.read_bytes())
        if content:
            content[len(content) // 2] ^= 0x40
            path.write_bytes(content)
            damaged += 1
    assert damaged
    # Everything behind the damage is done once more.
    for stage in (
        "tokens",
        "order",
        "shards",
        "export",
        "clusters",
        "bands",
        "documents-1",
        "documents-2",
        "tokenizer",
    ):
        if not any(ending in path.name for path in (result / "work" / stage).glob("*")):
            for record in (result / "done").glob(f"{stage}*-*.json"):
                record.unlink()
    (result / "summary.json").unlink()
    shutil.rmtree(result / "train")
    run_quietly(config)
    assert tree_hash(result) == tree_hash(finished / "out" / "corpus")


def test_a_damaged_plan_or_record_is_noticed(collection: Path) -> None:
    pipeline = write_pipeline(collection, run={"workers": 1, "keep_work": True}, steps=["exact_dedup"])
    result = run_quietly(pipeline)
    expected = tree_hash(result)
    record = result / "done" / "documents-0-000001.json"
    record.write_text(record.read_text().replace('"documents": ', '"documents": 9'))
    (result / "summary.json").unlink()
    assert tree_hash(run_quietly(pipeline)) == expected
    plan = result / "plan.json"
    plan.write_text(plan.read_text().replace("rows.jsonl", "raws.jsonl"))
    with pytest.raises(DataError, match=r"plan\.json: not a whole plan"):
        run_quietly(pipeline)


def test_two_pipelines_do_not_write_to_one_folder(finished: Path) -> None:
    with RunFolder(finished / "out" / "corpus"), pytest.raises(RunFolderInUseError):
        run_quietly(finished / "pipeline.yaml")


def test_a_changed_input_ends_the_pipeline_or_is_counted(collection: Path) -> None:
    pipeline = write_pipeline(collection, tokenizer=None, steps=[])
    torn = collection / "raw" / "text" / "torn.txt.gz"
    torn.write_bytes(b"\x1f\x8b\x08\x00torn")
    with pytest.raises(LlmtrainError, match=r"torn\.txt\.gz: cannot be unpacked.*read\.0\.on_damage=skip") as error:
        run_quietly(pipeline)
    assert error.value.exit_code == 3
    tree = json.loads(pipeline.read_text())
    tree["read"][0]["on_damage"] = "skip"
    pipeline.write_text(json.dumps({**tree, "name": "other"}))
    found = json.loads((run_quietly(pipeline) / "summary.json").read_text())
    assert found["sources"][0]["left_out"] == {"damaged": 1}
    assert "torn.txt.gz" in found["sources"][0]["examples"]["damaged"][0]
    assert found["sources"][0]["kept"] == 20


def test_sources_are_capped_by_the_seed_and_not_by_their_order(collection: Path) -> None:
    def kept(seed: int, **caps: int) -> list[str]:
        tree = json.loads(write_pipeline(collection, tokenizer=None, steps=["exact_dedup"], seed=seed).read_text())
        tree["read"][0] |= caps
        (collection / "pipeline.yaml").write_text(json.dumps({**tree, "name": f"{seed}-{'-'.join(caps)}"}, indent=1))
        result = run_quietly(collection / "pipeline.yaml")
        return [document["id"] for document in documents_of(result) if document["source"] == "text"]

    first, second = kept(1, max_documents=5), kept(2, max_documents=5)
    assert len(first) == len(second) == 5 and first != second
    names = [str(collection / "raw" / "text" / f"{number:03d}.txt") for number in range(20)]
    assert first != names[:5] and set(first) <= set(names)
    by_size = kept(1, max_bytes=40_000)
    sizes = [Path(name).stat().st_size for name in by_size]
    assert 10_000 < sum(sizes) <= 40_000


def test_a_tokenizer_of_bytes_is_trained_with_its_control_pieces(collection: Path) -> None:
    train = {"train": {"kind": "byte_bpe", "vocab_size": 500, "control_pieces": 4}}
    result = run_quietly(write_pipeline(collection, tokenizer=train, steps=[]))
    tokenizer = load_tokenizer(result / "tokenizer.json")
    assert tokenizer.vocab_size == 500 and tokenizer.pieces[tokenizer.eos_id] == "</s>"
    text = "def f(x):\n\treturn 'é' * x  # <|reserved_3|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    reserved = tokenizer.pieces.index("<|reserved_3|>")
    assert reserved not in tokenizer.encode(text)
    manifest = read_manifest(result / "train")
    assert manifest.tokenizer_sha256 == tokenizer.sha256
    assert any(
        np.array_equal(ids, tokenizer.encode(tokenizer.decode(ids))) for ids in shard_documents(result / "train")
    )


def test_a_document_on_which_a_step_fails_is_counted_and_named(
    collection: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library's own fault at one document ends nothing, and is told in the end."""
    judge = Length.__call__

    def failing(self: Length, document: Document, counts: Counter[str]) -> Any:
        if document.id == "row-7":
            raise ZeroDivisionError("in a library")
        return judge(self, document, counts)

    monkeypatch.setattr(Length, "__call__", failing)
    said = io.StringIO()
    config = load_pipeline(write_pipeline(collection, tokenizer=None, steps=[{"length": {}}])).config
    result = run_pipeline(config, InThisProcess(), Progress(Console(file=said, width=200)))
    step = json.loads((result / "summary.json").read_text())["steps"][0]
    assert step["dropped"] == {"error: ZeroDivisionError": 1} and len(documents_of(result)) == 41
    assert "note: length failed on 1 document (error: ZeroDivisionError), such as row-7" in said.getvalue()
    assert "read (length): 42 documents" in said.getvalue()


def test_no_document_left_says_so(collection: Path) -> None:
    with pytest.raises(LlmtrainError, match="0 documents are left of all inputs"):
        tokenizer = {"path": str(make_tokenizer(collection))}
        run_quietly(write_pipeline(collection, steps=[{"length": {"min_words": 1_000_000}}], tokenizer=tokenizer))


def make_tokenizer(folder: Path) -> Path:
    from data_pipelines.tokenizer import train_tokenizer

    train_tokenizer(source_texts(3), folder / "t.model", 400)
    return folder / "t.model"
