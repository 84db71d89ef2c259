"""The `data` verbs as a user runs them, one after another on one text."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from llmtrain.cli.data import app
from llmtrain.errors import ConfigError, DataError


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts, a tokenizer and shards, made by the commands."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "texts").mkdir()
    for number in range(40):
        (folder / "texts" / f"{number}.txt").write_text(f"text {number} says\n" + f"    line {number}\n" * 10)
    (folder / "texts" / "picture.bin").write_bytes(b"\xff\xfe\xfd")
    result = run("tokenizer", folder / "texts", folder / "t.model", "--vocab-size", 320)
    assert result.exit_code == 0, result.output
    result = run("shards", folder / "texts", folder / "out", "--tokenizer", folder / "t.model", "--valid-fraction", 0.2)
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert "read 40 documents" in result.stderr and "picture.bin" in result.stderr
    return folder


def test_inspect_speaks_to_people_and_machines(made: Path) -> None:
    result = run("inspect", made / "out", "--seq-len", 32, "--json")
    train, valid = json.loads(result.stdout)
    assert (train["path"], valid["path"]) == (str(made / "out" / "train"), str(made / "out" / "valid"))
    assert train["documents"] + valid["documents"] == 40
    assert train["samples"] == (train["tokens"] + train["documents"]) // 32 and train["unused_tokens"] == 0
    of_shards = (train["tokens"] + train["documents"] - 1) // 32
    unused = train["tokens"] + train["documents"] - 32 * of_shards - 1
    assert train["per_shard"]["samples"] == of_shards and train["per_shard"]["unused_tokens"] == unused
    assert list(train["length_quantiles"].values()) == sorted(train["length_quantiles"].values())
    text = run("inspect", made / "out", "--seq-len", 32).stdout
    assert f"{train['documents']} documents" in text and "per epoch; no token is left out" in text
    assert f"data.windows=per_shard {of_shards:,} samples; {unused} of " in text


def test_show_prints_the_text_with_document_boundaries(made: Path) -> None:
    result = run("show", made / "out", "--sample", 2, "--seq-len", 200)
    parts = [part.strip("\n") for part in result.stdout.split("-------- document --------\n")]
    assert len(parts) > 2
    texts = [path.read_text() for path in (made / "texts").glob("*.txt")]
    assert all(any(part in text for text in texts) for part in parts)
    assert "epoch 0" in result.stderr
    assert run("show", made / "out", "--sample", 2, "--seq-len", 200, "--seed", 7).stdout != result.stdout


def test_show_prints_what_the_objective_of_a_run_makes_of_a_sample(made: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "name: shown\nmodel: {family: encoder_decoder}\ntrain: {steps: 1}\n"
        "data: {train: [{path: elsewhere}], seq_len: 24, objective: span_corruption}\n"
    )
    shown = run("show", made / "out", "--run", tmp_path / "run.yaml").stdout
    assert [line for line in shown.splitlines() if line.startswith("--------")] == [
        f"-------- {title} --------" for title in ("encoder", "decoder", "targets")
    ]
    assert shown.count("<sentinel 0>") == 3 and "<pad><sentinel 0>" in shown and shown.rstrip().endswith("...")
    (tmp_path / "run.yaml").write_text(
        "name: shown\nmodel: {family: encoder}\ntrain: {steps: 1}\n"
        "data: {train: [{path: elsewhere}], seq_len: 24, objective: masked,"
        " masked: {mask_share: 1.0, random_share: 0.0}}\n"
    )
    shown = run("show", made / "out", "--run", tmp_path / "run.yaml").stdout
    assert shown.count("<mask>") == 3 and "..." in shown


def test_verify_passes_then_names_the_damage(made: Path, tmp_path: Path) -> None:
    result = run("verify", made / "out")
    assert result.exit_code == 0
    assert result.stderr.count("whole") == 2
    second = run("shards", made / "texts", tmp_path / "out", "--tokenizer", made / "t.model", "--valid-fraction", 0.2)
    assert second.exit_code == 0
    damaged = tmp_path / "out" / "valid" / "shard-000000.tar"
    assert damaged.read_bytes() == (made / "out" / "valid" / "shard-000000.tar").read_bytes()
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (tmp_path / "out" / "train" / "shard-000000.idx").unlink()
    error = run("verify", tmp_path / "out").exception
    assert isinstance(error, DataError) and error.exit_code == 3
    assert "valid/shard-000000.tar: expected" in str(error) and "train/shard-000000.idx: missing" in str(error)
    assert "rebuilt 1 sidecar;" in run("index", tmp_path / "out" / "train").stderr
    assert run("verify", tmp_path / "out" / "train").exit_code == 0


def test_index_takes_up_tars_that_have_no_manifest(made: Path, tmp_path: Path) -> None:
    assert run("shards", made / "texts", tmp_path / "out", "--tokenizer", made / "t.model").exit_code == 0
    train = tmp_path / "out" / "train"
    before = (train / "manifest.json").read_bytes()
    (train / "manifest.json").unlink()
    assert "indexed 1 shard of uint16," in run("index", train).stderr
    assert (train / "manifest.json").read_bytes() == before
    assert "has a manifest" in str(run("index", train, "--dtype", "uint32").exception)


def test_verify_sees_another_tokenizer_beside_the_shards(made: Path, tmp_path: Path) -> None:
    assert run("shards", made / "texts", tmp_path / "out", "--tokenizer", made / "t.model").exit_code == 0
    (tmp_path / "out" / "tokenizer.model").write_bytes(b"another")
    assert "tokenizer.model: expected sha256" in str(run("verify", tmp_path / "out").exception)


def test_faults_of_the_user_are_errors_of_ours(made: Path) -> None:
    for arguments in (
        ("shards", made / "none", made / "new", "--tokenizer", made / "t.model"),
        ("shards", made / "texts", made / "new", "--tokenizer", made / "none.model"),
        ("shards", made / "texts", made / "out", "--tokenizer", made / "t.model"),
        ("verify", made / "none"),
        ("verify", made / "texts"),
        ("shards", made / "texts" / "1.txt", made / "new", "--tokenizer", made / "t.model"),
        ("tokenizer", made / "texts", made / "new.model", "--vocab-size", 10),
    ):
        assert isinstance(run(*arguments).exception, ConfigError), arguments
    assert not (made / "new").exists()


def test_one_text_file_is_enough(made: Path, tmp_path: Path) -> None:
    """Whole, for training only; or cut where a separator stands."""
    text = tmp_path / "book.txt"
    text.write_text("<|end|>\n".join(f"chapter {number}\n" * 5 for number in range(40)))
    line = ("shards", text, tmp_path / "whole", "--tokenizer", made / "t.model")
    error = str(run(*line).exception)
    assert "of 1 documents" in error and "--separator" in error and "--valid-fraction 0" in error
    assert run(*line, "--valid-fraction", 0).exit_code == 0
    assert [row["documents"] for row in json.loads(run("inspect", tmp_path / "whole", "--json").stdout)] == [1]
    assert run("verify", tmp_path / "whole").exit_code == 0
    cut = ("shards", text, tmp_path / "cut", "--tokenizer", made / "t.model", "--separator", "<|end|>\\n")
    assert run(*cut).exit_code == 0
    train, valid = json.loads(run("inspect", tmp_path / "cut", "--json").stdout)
    assert train["documents"] + valid["documents"] == 40
    shown = run("show", tmp_path / "cut", "--seq-len", 60).stdout
    assert "<|end|>" not in shown and shown.count("-------- document --------") > 0
    assert run(*cut[:-1], "", "--overwrite").exit_code == 2
    assert run("tokenizer", text, tmp_path / "c.model", "--vocab-size", 300, "--separator", "<|end|>").exit_code == 0
