"""Only the tokenizer that a model was trained with is taken for it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llmtrain.cli.app import app
from llmtrain.config.model import ModelConfig
from llmtrain.data.storage.manifest import file_sha256
from llmtrain.data.token_roles import TrainedTokens
from llmtrain.errors import ConfigError, DataError
from llmtrain.infer.tokenizer import model_tokenizer
from tests.support.hf_folders import write_gpt2, write_llama
from tests.support.tokenizers import train_sentencepiece


def _call(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf` and its import `run`; `own` with a sentencepiece model of the same size, `large` with a larger one."""
    place = tmp_path_factory.mktemp("place")
    write_llama(place / "hf")
    assert _call("import", place / "hf", place / "run").exit_code == 0
    text = [f"some text {number} and more of it, in words\n" for number in range(300)]
    for name, size in (("own", 300), ("large", 330)):
        (place / f"{name}.model").write_bytes(train_sentencepiece(text, "bpe", size))
    write_gpt2(place / "other")
    return place


COMMANDS = {
    "export": lambda place, out: ("export", place / "run", out),
    "generate": lambda place, out: ("generate", place / "run", "--prompt", "the"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("large.model", "has 330 ids, and the model has 300"),
        ("own.model", "is another tokenizer"),
        ("other/tokenizer.json", "is another tokenizer"),
        ("nowhere.json", "no such file"),
        ("hf", "is a folder. Try"),
    ],
)
def test_another_tokenizer_is_refused(command: str, name: str, says: str, place: Path, tmp_path: Path) -> None:
    result = _call(*COMMANDS[command](place, tmp_path / "out"), "--tokenizer", place / name)
    assert (result.exit_code, result.stdout) == (2, "") and says in result.stderr, result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_same_tokenizer_in_another_file_is_taken(command: str, place: Path, tmp_path: Path) -> None:
    content = json.loads((place / "hf" / "tokenizer.json").read_text("utf-8"))
    (tmp_path / "same.json").write_text(json.dumps(content), "utf-8")  # other bytes
    result = _call(*COMMANDS[command](place, tmp_path / "out"), "--tokenizer", tmp_path / "same.json")
    assert result.exit_code == 0, result.stderr
    if command == "export":
        assert (tmp_path / "out" / "chat_template.jinja").exists(), "what the folder said is that tokenizer's too"


def test_without_one_beside_the_model_the_hash_in_the_checkpoint_decides(place: Path, tmp_path: Path) -> None:
    model, path = ModelConfig(vocab_size=400), place / "own.model"
    assert model_tokenizer(path, None, model, TrainedTokens(file_sha256(path))).path == path
    with pytest.raises(ConfigError, match="sha256"):
        model_tokenizer(path, None, model, TrainedTokens("0" * 64))
    with pytest.raises(ConfigError, match="--tokenizer"):
        model_tokenizer(None, None, model)


def test_a_tokenizer_beside_the_model_that_is_another_one_is_damage(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "run", tmp_path / "run")
    (tmp_path / "run" / "tokenizer.json").unlink()
    shutil.copyfile(place / "own.model", tmp_path / "run" / "tokenizer.model")
    for name in COMMANDS:
        result = _call(*COMMANDS[name](tmp_path, tmp_path / "out"))
        assert result.exit_code == 3 and "run/tokenizer.model: is not the tokenizer" in result.stderr
        mended = _call(*COMMANDS[name](tmp_path, tmp_path / "out"), "--tokenizer", place / "hf" / "tokenizer.json")
        assert mended.exit_code == 0, mended.stderr
    assert (tmp_path / "out" / "chat_template.jinja").exists(), "what is said beside the damaged one still counts"


def test_the_settings_beside_the_tokenizer_do_not_get_lost_in_silence(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "run", tmp_path / "run")
    (tmp_path / "run" / "tokenizer_settings.json").unlink()
    for name in COMMANDS:
        result = _call(*COMMANDS[name](tmp_path, tmp_path / "out"))
        assert result.exit_code == 3 and "tokenizer_settings.json: missing" in result.stderr


def test_a_tokenizer_of_before_that_does_not_fit_its_model_is_damage(place: Path) -> None:
    """Checkpoints of before do not say which tokenizer they were trained with."""
    with pytest.raises(DataError, match="330 ids"):
        model_tokenizer(None, place / "large.model", ModelConfig(vocab_size=300))


def test_texts_end_and_begin_as_the_documents_did(place: Path) -> None:
    model, path = ModelConfig(vocab_size=300), place / "own.model"
    own = model_tokenizer(None, path, model)
    known = TrainedTokens(own.sha256, own.eos_id, own.bos_ids)
    assert model_tokenizer(None, path, model, known).eos_id == own.eos_id
    for changed in ({"eos_id": own.eos_id + 1}, {"bos_ids": (1,)}):
        with pytest.raises(DataError, match=r"tokenizer_settings\.json: gives"):
            model_tokenizer(None, path, model, replace(known, **changed))
