"""PEFT folders used as they are: the numbers of the run that they came from, with every kind of base."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain.data.tokenizer import SentencePieceTokenizer
from llmtrain.errors import ConfigError
from llmtrain.infer.model import find_model, logits_of
from tests.unit.interop.models import random_example
from tests.unit.interop.peft.adapters import MODELS, adapted_logits, random_adapter, write_base
from tests.unit.interop.peft.test_runs import LORA, call, write_run

CPU = torch.device("cpu")
PROMPT = {"method": "prompt", "prompt": {"tokens": 3}}


@pytest.fixture(scope="session")
def model_file(small_tokenizer: SentencePieceTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of that tokenizer."""
    return next(tmp_path_factory.getbasetemp().glob("tokenizer*/tokenizer.model"))


def exported(folder: Path, name: str, finetune: dict[str, Any], tokenizer: Path, *options: str) -> Any:
    """A run and its adapter's folder; the adapter in memory."""
    adapter = random_adapter(name, finetune)
    write_run(folder / "run", adapter, tokenizer)
    code, said = call("export", folder / "run", folder / "adapter", "--to", "peft", *options)
    assert code == 0, said
    return adapter


@pytest.mark.parametrize(("name", "finetune"), [("llama", LORA), ("mixtral", LORA), ("t5", LORA), ("llama", PROMPT)])
def test_an_adapter_and_its_base_compute_what_the_run_did(
    tmp_path: Path, model_file: Path, monkeypatch: pytest.MonkeyPatch, name: str, finetune: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    adapter = exported(tmp_path, name, finetune, model_file, "--base", "base")
    write_base(tmp_path / "base", name)
    example = random_example(MODELS[name])
    found = [find_model(path).read(CPU).model for path in (tmp_path / "adapter", tmp_path / "run")]
    with torch.no_grad():
        ours, theirs = (logits_of(model, example) for model in found)
        assert torch.equal(ours, theirs)
        assert torch.equal(ours, adapted_logits(adapter.source, adapter.model, adapter.finetune, example))
        plain = logits_of(find_model(tmp_path / "base").read(CPU).model, example)
    assert not torch.equal(ours, plain), "the adapter is used"


def test_the_base_may_be_a_run_and_texts_are_those_of_the_run(tmp_path: Path, model_file: Path) -> None:
    exported(tmp_path, "llama", LORA, model_file)
    write_run(tmp_path / "base", random_adapter("llama", {"method": "full"}), model_file)
    asked = ("--prompt", "a word", "--max-tokens", "8", "--temperature", "0")
    texts = [call("generate", tmp_path / "run", *asked)]
    texts.append(call("generate", tmp_path / "adapter", "--base", tmp_path / "base", *asked))
    assert texts[0][0] == 0 and texts[0] == texts[1]


@pytest.mark.parametrize(
    ("named", "base", "says"),
    [
        (None, None, "names no base. Give --base FOLDER"),
        ("meta-llama/Llama-3.1-8B", None, "is an adapter of 'meta-llama/Llama-3.1-8B', and there is no such folder"),
        (None, "run", "has a lora beside its weights itself. Merge it first"),
        (None, "nowhere", "nowhere: no such folder"),
        (None, "gpt2", "is no linear in the layers of this GPT-2"),
    ],
)
def test_what_cannot_be_used_is_told(
    tmp_path: Path, model_file: Path, monkeypatch: pytest.MonkeyPatch, named: str | None, base: str | None, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    exported(tmp_path, "llama", LORA, model_file)
    settings = json.loads(Path("adapter/adapter_config.json").read_text("utf-8"))
    Path("adapter/adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": named}), "utf-8")
    write_base(tmp_path / "gpt2", "gpt2")
    options = () if base is None else ("--base", base)
    code, said = call("generate", "adapter", "--prompt", "a", *options)
    assert code in (2, 3) and says in said


def test_a_base_that_is_not_asked_for_is_refused(tmp_path: Path, model_file: Path) -> None:
    write_run(tmp_path / "run", random_adapter("llama", {"method": "full"}), model_file)
    for model in (tmp_path / "run", write_base(tmp_path / "base", "llama")):
        with pytest.raises(ConfigError, match=r"--base .*: goes with"):
            find_model(model, tmp_path / "base")
