"""Options of generate, export and import with values that make no sense: a message and 2 or 3, no traceback."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from llmtrain.cli.app import app
from tests.support.hf_folders import write_llama

BIG = str(10**30)
GENERATE = [
    ("--temperature", "nan"), ("--temperature", "inf"), ("--temperature", "-1"), ("--temperature", "1e-320"),
    ("--stop", ""), ("--top-k", "-1"),
    ("--top-p", "nan"), ("--top-p", "0"), ("--seed", BIG), ("--seed", f"-{BIG}"), ("--max-tokens", "0"),
    ("--device", "tpu"), ("--tokenizer", "/dev/null"), ("--tokenizer", "/"),
]  # fmt: skip
SENSELESS = [
    ("--temperature", "100"),
    ("--top-k", BIG),
    ("--top-p", "1e-300"),
    ("--seed", "-1"),
    ("--max-tokens", "99"),
]
EXPORT = [
    ("--max-shard-size", "0"), ("--max-shard-size", "9" * 5000), ("--proof-memory", "x"), ("--family", "nope"),
    ("--dtype", "int8"), ("--to", "tflite"), ("--proof", "x"), ("--tokenizer", "/dev/null"), ("--tokenizer", ""),
]  # fmt: skip


def _call(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    write_llama(place / "hf")
    assert _call("import", place / "hf", place / "run").exit_code == 0
    return place


def _refused(result: Any) -> None:
    assert result.exit_code in (2, 3) and isinstance(result.exception, SystemExit), (result.exception, result.stderr)
    assert result.stdout == "" and result.stderr


@pytest.mark.parametrize("option", GENERATE, ids=" ".join)
@pytest.mark.parametrize("model", ["hf", "run"])
def test_generate(model: str, option: tuple[str, str], place: Path) -> None:
    _refused(_call("generate", place / model, "--prompt", "the", *option))


@pytest.mark.parametrize("option", SENSELESS, ids=" ".join)
def test_generate_with_values_that_are_legal(option: tuple[str, str], place: Path) -> None:
    assert _call("generate", place / "run", "--prompt", "the", *option).exit_code == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_generate_on_a_gpu_that_is_not_there(place: Path) -> None:
    result = _call("generate", place / "run", "--prompt", "the", "--device", "cuda")
    _refused(result)
    assert "--device cuda" in result.stderr and "llmtrain doctor" in result.stderr


@pytest.mark.parametrize("prompt", ["\ud800", "the " * 5000])
def test_prompts(prompt: str, place: Path) -> None:
    _refused(_call("generate", place / "run", "--prompt", prompt))


@pytest.mark.parametrize("option", EXPORT, ids=lambda option: " ".join(option)[:40])
def test_export(option: tuple[str, str], place: Path, tmp_path: Path) -> None:
    _refused(_call("export", place / "run", tmp_path / "out", *option))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("out", ["file/below", "file", "."])
def test_places_that_no_folder_can_be_written_to(out: str, place: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for arguments in (("export", place / "run"), ("import", place / "hf")):
        _refused(_call(*arguments, tmp_path / out))


@pytest.mark.parametrize("source", ["nowhere", "file", "empty"])
@pytest.mark.parametrize("verb", ["generate", "export", "import"])
def test_sources_that_are_no_model(verb: str, source: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    more = ("--prompt", "a") if verb == "generate" else (tmp_path / "out",)
    result = _call(verb, tmp_path / source, *more)
    _refused(result)
    if verb == "generate":
        assert "Hugging Face folder" in result.stderr and "a checkpoint" in result.stderr
        assert ("no such folder" in result.stderr) == (source == "nowhere")


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json", "chat_template.jinja"]
)
@pytest.mark.parametrize("content", [b"", b"[1]", b'{"a": ', b"\xff\xfe", b"[" * 5000])
def test_damaged_files_of_a_folder(name: str, content: bytes, place: Path, tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    hf.mkdir()
    for path in (place / "hf").iterdir():
        (hf / path.name).symlink_to(path)
    (hf / name).unlink()
    (hf / name).write_bytes(content)
    if name == "chat_template.jinja" and content.isascii():
        return  # any text is a template
    for arguments in (("generate", hf, "--prompt", "a"), ("import", hf, tmp_path / "run")):
        result = _call(*arguments)
        _refused(result)
        assert name in result.stderr


def test_a_role_that_the_tokenizer_does_not_have_is_told(place: Path, tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    hf.mkdir()
    for path in (place / "hf").iterdir():
        (hf / path.name).symlink_to(path)
    content = json.loads((hf / "config.json").read_text())
    (hf / "config.json").unlink()
    (hf / "config.json").write_text(json.dumps({**content, "eos_token_id": [1, 99999], "pad_token_id": -1}))
    notes = json.loads(_call("import", hf, tmp_path / "run", "--json").stdout)["notes"]
    assert any("pad_token = -1" in note for note in notes), notes
    assert any("99999" in note for note in notes), notes
