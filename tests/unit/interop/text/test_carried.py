"""A folder of others, imported and exported again: what it said about tokens and generation comes back as it was."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

from llmtrain.cli.app import app
from llmtrain.data.storage.manifest import read_manifest
from llmtrain.data.token_roles import SETTINGS_NAME, read_settings
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.files import sealed, unsealed
from llmtrain.infer.batching.arena import Arena
from llmtrain.infer.batching.scheduler import BatchStep, PromptChunk
from tests.support.hf_folders import FOLDERS, LLAMA_BOS, write_llama

PROMPTS = ("def export(self):", "the lazy dog", "")


def _call(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)])


def _json(*arguments: str | Path) -> dict[str, Any]:
    result = _call(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module", params=sorted(FOLDERS))
def there_and_back(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `hf`, its import `run`, and the export of that, `out`; `told` is what the commands said."""
    place = tmp_path_factory.mktemp(request.param)
    FOLDERS[request.param](place / "hf")
    told = {"import": _json("import", place / "hf", place / "run")}
    told["export"] = _json("export", place / "run", place / "out")
    (place / "told.json").write_text(json.dumps(told))
    return place


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))


WRITTEN_OUT = {"gpt2": {"n_inner": 128}, "t5": {"n_positions": 512}}
"""Sizes that the class of transformers leaves to a default, and an export says."""

SPELLED_AGAIN = {
    "bert": {"position_embedding_type": "absolute"},
    "llama": {"rope_theta": 10000.0, "rope_scaling": None},
}
"""Keys that other readers have for what transformers 5 writes once."""


def test_what_an_export_differs_in_from_the_folder(there_and_back: Path) -> None:
    hf, out = there_and_back / "hf", there_and_back / "out"
    names = {path.name for path in hf.iterdir()}
    assert {path.name for path in out.iterdir()} == names | {"README.md", "llmtrain.json"}
    for name in sorted(names - {"model.safetensors"}):
        if not name.endswith(".json") or name == "tokenizer.json":
            assert (out / name).read_bytes() == (hf / name).read_bytes(), name
            continue
        was, now = _read(hf / name), _read(out / name)
        apart = {key for key in was.keys() | now.keys() if was.get(key, "absent") != now.get(key, "absent")}
        kind = was.get("model_type", "")
        expected = {**WRITTEN_OUT.get(kind, {}), **SPELLED_AGAIN.get(kind, {})}
        expected |= {"torch_dtype": "float32"} if name == "config.json" else {}
        assert {key: now.get(key, "absent") for key in apart} == expected, name


def test_what_transformers_makes_of_a_prompt_is_the_same(there_and_back: Path) -> None:
    was, now = (AutoTokenizer.from_pretrained(there_and_back / name, local_files_only=True) for name in ("hf", "out"))
    for prompt in PROMPTS:
        assert now(prompt)["input_ids"] == was(prompt)["input_ids"]
    assert now.special_tokens_map == was.special_tokens_map
    assert now.chat_template == was.chat_template


def test_nothing_is_lost_that_is_not_said(there_and_back: Path) -> None:
    told = _read(there_and_back / "told.json")
    assert told["import"]["notes"] == [] and told["export"]["notes"] == []


def test_a_run_knows_which_tokens_end_and_begin_texts(tmp_path: Path) -> None:
    _json("import", write_llama(tmp_path / "hf"), tmp_path / "run")
    tokenizer = load_tokenizer(tmp_path / "run" / "tokenizer.json")
    assert (tokenizer.eos_id, tokenizer.end_ids, tokenizer.bos_ids) == (1, (1, 2), (0,))
    assert (tokenizer.bos_id, tokenizer.pad_id) == (0, 3)
    assert tokenizer.roles.files["generation_config.json"]["temperature"] == 0.6


@pytest.mark.parametrize("model", ["hf", "run"])
def test_generate_begins_as_training_did_and_stops_at_every_end(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _json("import", write_llama(tmp_path / "hf"), tmp_path / "run")
    tokenizer = load_tokenizer(tmp_path / "hf" / "tokenizer.json")
    prompt, answer = (0, *tokenizer.encode("the lazy")), tokenizer.encode("fox")
    for end in tokenizer.end_ids:

        def written(self: Arena, step: BatchStep, end: int = end) -> torch.Tensor:
            (part,) = step.chosen
            if isinstance(part, PromptChunk):
                assert part.tokens == prompt
            token = [*answer, end, *tokenizer.encode("dog")][part.end - len(prompt)]
            return torch.eye(tokenizer.vocab_size)[[token]]

        monkeypatch.setattr(Arena, "run", written)
        result = _call("generate", tmp_path / model, "--prompt", "the lazy", "--temperature", "0")
        assert result.exit_code == 0 and result.stdout == "fox\n", result.stderr


def _shards(place: Path, tokenizer: Path, *options: str) -> Path:
    texts = place / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"the fox {number} jumps"}) + "\n" for number in range(60)))
    out = place / "-".join(("shards", *options)).replace("--", "")
    result = _call("data", "shards", texts, out, "--tokenizer", tokenizer, "--valid-fraction", "0.3", *options)
    assert result.exit_code == 0, result.stderr
    return out


def test_documents_begin_and_end_as_the_folder_says(tmp_path: Path) -> None:
    hf = write_llama(tmp_path / "hf")
    tokenizer = load_tokenizer(hf / "tokenizer.json")
    followed, plain = _shards(tmp_path, tokenizer.path), _shards(tmp_path, tokenizer.path, "--bos", "none")
    for folder, bos_ids in ((followed, (0,)), (plain, ())):
        manifest = read_manifest(folder / "train")
        assert (manifest.eos_id, manifest.bos_ids, manifest.lossy) == (1, bos_ids, False)
        assert _call("data", "verify", folder).exit_code == 0
        shown = _call("data", "show", folder, "--seq-len", "64").stdout
        assert "the fox" in shown and LLAMA_BOS not in shown
    from llmtrain.data.storage.shard_file import ShardFile

    for folder, begin in ((followed, [0]), (plain, [])):
        file = ShardFile(folder / "train", read_manifest(folder / "train"), 0, hashed=True)
        document = file.document(0).tolist()
        assert document == [*begin, *tokenizer.encode(tokenizer.decode(document))]
    settings = read_settings(plain / SETTINGS_NAME)
    assert (settings.bos_ids, settings.end_ids) == ((), (1, 2)), "ends of the model are the tokenizer's too"
    assert "generation_config.json" not in settings.files, "another model may be trained with the same tokenizer"


def test_a_changed_or_missing_settings_file_is_found(tmp_path: Path) -> None:
    folder = _shards(tmp_path, write_llama(tmp_path / "hf") / "tokenizer.json")
    content = (folder / SETTINGS_NAME).read_text("utf-8")
    (folder / SETTINGS_NAME).write_text(content.replace('"eos_id": 1', '"eos_id": 7'), "utf-8")
    result = _call("data", "verify", folder)
    assert result.exit_code == 3 and SETTINGS_NAME in result.stderr
    (folder / SETTINGS_NAME).unlink()
    result = _call("data", "verify", folder)
    assert result.exit_code == 3 and "missing" in result.stderr


def test_an_export_puts_before_a_text_what_documents_began_with(tmp_path: Path) -> None:
    _json("import", write_llama(tmp_path / "hf"), tmp_path / "run")
    settings = tmp_path / "run" / SETTINGS_NAME
    content = unsealed(_read(settings))
    settings.write_text(json.dumps(sealed({**content, "bos_ids": []})))  # as --bos none is recorded
    told = _json("export", tmp_path / "run", tmp_path / "out")
    assert any(LLAMA_BOS in note and "--bos" in note for note in told["notes"])
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    ours = load_tokenizer(tmp_path / "run" / "tokenizer.json")
    assert theirs("the lazy dog")["input_ids"] == ours.encode("the lazy dog")
    assert theirs.bos_token == LLAMA_BOS and theirs.chat_template is not None
