"""Bottleneck adapters in AdapterHub's form: its library computes from them what we compute."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from llmtrain.errors import ConfigError
from llmtrain.interop.adapterhub import adapterhub_files, write_adapterhub
from llmtrain.interop.peft.writing import PeftSettings
from tests.support.readers import judged_by_adapterhub
from tests.unit.interop.models import random_example
from tests.unit.interop.peft.adapters import MODELS, adapted_logits, random_adapter, write_base, write_inputs
from tests.unit.interop.peft.test_against_peft import require_near

CASES = [
    (name, placement, activation)
    for name in ("llama", "mistral", "gpt2", "bert", "t5")
    for placement, activation in (("output", "gelu"), ("both", "relu"))
] + [("llama", "output", "silu"), ("bert", "both", "silu")]


def finetune_of(placement: str, activation: str, size: int = 7) -> dict[str, Any]:
    return {"method": "adapter", "adapter": {"size": size, "placement": placement, "activation": activation}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the library is asked, in one process."""
    place, tasks = tmp_path_factory.mktemp("adapterhub"), []
    for name in sorted({name for name, *_ in CASES}):
        write_base(place / name, name)
        write_inputs(place / f"{name}.safetensors", name)
    for case in CASES:
        folder = place / "-".join(case)
        folder.mkdir()
        write_adapterhub(folder, random_adapter(case[0], finetune_of(*case[1:])), PeftSettings())
        files = {"base": place / case[0], "adapter": folder, "inputs": place / f"{case[0]}.safetensors"}
        tasks.append({key: str(path) for key, path in {**files, "out": folder / "out.safetensors"}.items()})
    judged_by_adapterhub(tasks)
    return place


@pytest.mark.whole_grid
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_the_library_computes_what_we_compute(place: Path, case: tuple[str, str, str]) -> None:
    adapter, example = random_adapter(case[0], finetune_of(*case[1:])), random_example(MODELS[case[0]])
    theirs = load_file(place / "-".join(case) / "out.safetensors")["adapted"]
    require_near(adapted_logits(adapter.source, adapter.model, adapter.finetune, example), theirs, case[0])


@pytest.mark.parametrize("size", [1, 5, 7, 16, 47, 48, 64])
def test_the_library_finds_the_width(size: int) -> None:
    """It rounds the width of the model divided by the factor down."""
    config, tensors = adapterhub_files(random_adapter("llama", finetune_of("output", "gelu", size)), None)
    assert int(config["hidden_size"] // config["config"]["reduction_factor"]) == size
    assert {tuple(tensor.shape) for name, tensor in tensors.items() if "down.0.weight" in name} == {(size, 48)}


def test_files(tmp_path: Path) -> None:
    for folder in (tmp_path / "one", tmp_path / "other"):
        folder.mkdir()
        write_adapterhub(folder, random_adapter("t5", finetune_of("both", "gelu")), PeftSettings(base="t5-small"))
    names = ["README.md", "adapter.safetensors", "adapter_config.json"]
    one, other = ([(tmp_path / folder / name).read_bytes() for name in names] for folder in ("one", "other"))
    assert one == other and sorted(path.name for path in (tmp_path / "one").iterdir()) == names
    config = json.loads((tmp_path / "one/adapter_config.json").read_text())
    assert (config["model_type"], config["model_class"]) == ("t5", "T5ForConditionalGeneration")
    assert config["model_name"] == "t5-small"
    held = load_file(tmp_path / "one/adapter.safetensors")
    assert "decoder.block.1.layer.2.adapters.llmtrain.adapter_down.0.weight" in held
    assert len(held) == 4 * 2 * (MODELS["t5"].encoder_layers + MODELS["t5"].decoder_layers)


@pytest.mark.parametrize(
    ("name", "finetune", "says"),
    [
        ("llama", {"method": "lora"}, "Try --to peft"),
        ("mixtral", finetune_of("output", "gelu"), "has llama, mistral, gpt2, bert, t5"),
        ("qwen3", finetune_of("output", "gelu"), "Qwen3: the library"),
    ],
)
def test_what_has_no_form_is_refused(name: str, finetune: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        adapterhub_files(random_adapter(name, finetune), None)
