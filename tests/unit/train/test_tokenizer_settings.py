"""What a run folder keeps of its tokenizer's settings: from the data, and from the import that it rests on."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llmtrain.cli.app import app
from llmtrain.config.reading.load import load_config
from llmtrain.data.token_roles import SETTINGS_NAME, read_settings
from llmtrain.errors import DataError
from llmtrain.files import sealed, unsealed
from llmtrain.preflight.resolve import resolve
from llmtrain.train.start import save_run_files
from tests.support.hf_folders import write_llama
from tests.support.run_files import replace_tokenizer
from tests.support.tokenizers import train_sentencepiece

TEXTS = [f"the fox {number} jumps\nover a dog " * 20 for number in range(40)]


def _call(*arguments: str | Path) -> Any:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 0, result.stderr
    return result


def _shards(out: str, tokenizer: Path, *options: str) -> None:
    Path("texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    _call("data", "shards", "texts.jsonl", out, "--tokenizer", tokenizer, "--valid-fraction", "0.3", *options)


def _config(*overrides: str) -> Any:
    Path("run.yaml").write_text(
        "base: imported/config.yaml\nname: more\ndata: {train: [{path: shards/train}], seq_len: 32}\n"
        "train: {steps: 5, global_batch_size: 2, micro_batch_size: 1}\noptim: {warmup_steps: 1}\n"
        "checkpoint: {resume: imported}\n"
    )
    return load_config(Path("run.yaml"), overrides).config


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_llama(tmp_path / "hf")
    _call("import", "hf", "imported")
    return tmp_path


@pytest.mark.parametrize(("options", "bos_ids"), [((), (0,)), (("--bos", "none"), ())])
def test_a_run_keeps_what_data_and_import_say(options: tuple[str, ...], bos_ids: tuple[int, ...], place: Path) -> None:
    _shards("shards", Path("imported/tokenizer.json"), *options)
    (place / "run").mkdir()
    save_run_files(resolve(_config()), place / "run", next((place / "imported" / "checkpoints").glob("step-*")))
    kept = read_settings(place / "run" / SETTINGS_NAME)
    assert (kept.eos_id, kept.end_ids, kept.bos_ids) == (1, (1, 2), bos_ids)
    assert kept.files["generation_config.json"]["top_k"] == 20, "from the import"
    assert kept.files["tokenizer_config.json"]["pad_token"] == "<|fill|>", "from the data"


def test_a_run_from_nothing_keeps_what_the_tokenizer_says_and_nothing_of_a_model(place: Path) -> None:
    _shards("shards", Path("hf/tokenizer.json"))
    (place / "run").mkdir()
    save_run_files(resolve(_config()), place / "run", None)
    kept = read_settings(place / "run" / SETTINGS_NAME)
    assert kept.bos_ids == (0,) and set(kept.files) == {"tokenizer_config.json", "chat_template.jinja"}


def test_data_without_its_settings_is_refused_before_a_run(place: Path) -> None:
    _shards("shards", Path("hf/tokenizer.json"))
    (place / "shards" / SETTINGS_NAME).unlink()
    (place / "run").mkdir()
    with pytest.raises(DataError, match=SETTINGS_NAME):
        save_run_files(resolve(_config()), place / "run", None)
    result = CliRunner().invoke(app, ["train", "run.yaml", "--dry-run"])
    assert result.exit_code == 3 and SETTINGS_NAME in result.stderr


def test_data_of_before_means_what_it_meant(place: Path) -> None:
    _shards("shards", Path("hf/tokenizer.json"), "--bos", "none")
    for split in ("train", "valid"):
        manifest = place / "shards" / split / "manifest.json"
        content = json.loads(manifest.read_text())
        del content["settings_sha256"], content["seal"]
        content["schema_version"] = 1
        assert "bos_ids" not in content and "lossy" not in content
        manifest.write_text(json.dumps(content))
    (place / "shards" / SETTINGS_NAME).unlink()
    (place / "run").mkdir()
    save_run_files(resolve(_config()), place / "run", None)
    kept = read_settings(place / "run" / SETTINGS_NAME)
    assert (kept.eos_id, kept.bos_ids, dict(kept.files)) == (1, (), {})


def test_a_damaged_tokenizer_of_the_data_does_not_replace_the_run_s_good_one(place: Path) -> None:
    (place / "own.model").write_bytes(train_sentencepiece(TEXTS, "bpe", 300))
    _shards("shards", Path("own.model"))
    Path("run.yaml").write_text(
        "name: more\ndata: {train: [{path: shards/train}], seq_len: 32}\n"
        "model: {num_layers: 1, hidden_size: 32, num_heads: 2, max_seq_len: 32}\n"
        "train: {steps: 5, global_batch_size: 2, micro_batch_size: 1}\noptim: {warmup_steps: 1}\n"
    )
    config = load_config(Path("run.yaml")).config
    (place / "run").mkdir()
    save_run_files(resolve(config), place / "run")
    before = {path.name: path.read_bytes() for path in (place / "run").iterdir()}
    source = place / "shards" / "tokenizer.model"
    good = source.read_bytes()
    source.write_bytes(good.replace(b"dog", b"dig"))
    assert source.read_bytes() != good
    with pytest.raises(DataError, match=r"shards/tokenizer.model: expected sha256"):
        save_run_files(resolve(config), place / "run")
    assert {path.name: path.read_bytes() for path in (place / "run").iterdir()} == before
    result = CliRunner().invoke(app, ["train", "run.yaml", "--dry-run"])
    assert result.exit_code == 3 and "shards/tokenizer.model" in result.stderr, result.stderr
    shown = CliRunner().invoke(app, ["data", "show", "shards/train", "--seq-len", "32"])
    assert shown.exit_code == 3 and "shards/tokenizer.model" in shown.stderr
    source.write_bytes(good)
    (place / "run" / "tokenizer.model").write_bytes(b"spoiled")
    save_run_files(resolve(config), place / "run")
    assert (place / "run" / "tokenizer.model").read_bytes() == good, "a resume mends the run's own copy"


def test_sources_that_begin_otherwise_are_no_mixture(place: Path) -> None:
    _shards("shards", Path("hf/tokenizer.json"))
    _shards("plain", Path("hf/tokenizer.json"), "--bos", "none")
    _config()
    override = "data.valid=[{path: plain/valid}]"
    result = CliRunner().invoke(app, ["train", "run.yaml", "--dry-run", override])
    assert result.exit_code == 2 and "bos_ids = []" in result.stderr and "--bos" in result.stderr


def test_own_shards_go_on_with_the_import_of_an_own_export(place: Path) -> None:
    (place / "own.model").write_bytes(train_sentencepiece(TEXTS, "bpe", 300))
    _shards("shards", Path("own.model"))
    assert not (place / "shards" / SETTINGS_NAME).exists(), "nothing is said beside an own tokenizer"
    assert "bos_ids" not in (place / "shards" / "train" / "manifest.json").read_text()
    run = place / "old"
    _call("export", "imported", "hf-of-another")
    _run_with_own_tokenizer(run, place)
    _call("export", run, "own-hf")
    _call("import", "own-hf", "again")
    _config()
    text = Path("run.yaml").read_text().replace("imported", "again")
    Path("run.yaml").write_text(text)
    _call("train", "run.yaml", "--dry-run")
    settings = unsealed(json.loads((place / "again" / SETTINGS_NAME).read_text()))
    (place / "again" / SETTINGS_NAME).write_text(json.dumps(sealed({**settings, "equal_sha256": []})))
    result = CliRunner().invoke(app, ["train", "run.yaml", "--dry-run"])
    assert result.exit_code == 2 and "data.tokenizer" in result.stderr


def _run_with_own_tokenizer(run: Path, place: Path) -> None:
    """The imported weights as if trained with the own tokenizer."""
    import shutil

    shutil.copytree(place / "imported" / "checkpoints", run / "checkpoints")
    replace_tokenizer(run, (place / "own.model").read_bytes())
