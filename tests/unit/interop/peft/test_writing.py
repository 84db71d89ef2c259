"""The files of an adapter: what stands in them, that they can be read again, and what has no form in PEFT."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmtrain.errors import ConfigError
from llmtrain.interop.hf import FAMILIES
from llmtrain.interop.peft.modules import short_names
from llmtrain.interop.peft.reading import open_peft_folder, targets_of
from llmtrain.interop.peft.writing import PeftSettings, adapter_files, write_peft
from tests.unit.interop.peft.adapters import MODELS, random_adapter
from tests.unit.interop.peft.test_against_peft import OURS

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def written(folder: Path, name: str, finetune: dict[str, Any], **settings: Any) -> Path:
    folder.mkdir(parents=True)
    write_peft(folder, random_adapter(name, finetune), PeftSettings(**settings))
    return folder


@pytest.mark.parametrize("case", OURS)
def test_what_was_written_is_read_again(tmp_path: Path, case: str) -> None:
    name, lora = OURS[case]
    adapter = random_adapter(name, {"method": "lora", "lora": lora})
    folder = written(tmp_path / "adapter", name, {"method": "lora", "lora": lora})
    found = open_peft_folder(folder, adapter.family, adapter.model)
    assert found.finetune.lora.scale == pytest.approx(adapter.finetune.lora.scale, rel=1e-12)
    for linear, (a, b) in adapter.pairs().items():
        stem = f"{linear}.lora_" if f"{linear}.lora_a" in found.tensors else f"{linear}_lora_"
        read_a, read_b = found.tensors[f"{stem}a"], found.tensors[f"{stem}b"]
        assert torch.allclose(read_b @ read_a, b @ a, atol=1e-7), linear
        if case in ("llama", "gpt2", "t5", "mixtral", "switch"):
            assert torch.equal(read_a, a) and torch.equal(read_b, b), linear
    for key in adapter.trained_also():
        assert torch.equal(found.tensors[key], adapter.source.held[key])  # type: ignore[attr-defined]


def test_equal_inputs_give_equal_bytes(tmp_path: Path) -> None:
    one, other = (written(tmp_path / name, "gpt2", {"method": "lora"}, base="gpt2") for name in "ab")
    assert sorted(path.name for path in one.iterdir()) == FILES
    assert [(one / name).read_bytes() for name in FILES] == [(other / name).read_bytes() for name in FILES]


def test_the_settings_of_gpt2(tmp_path: Path) -> None:
    """Its three attention inputs are one module of three times the rank, whose B is block-diagonal."""
    finetune = {"method": "lora", "lora": {"rank": 4, "alpha": 6, "dropout": 0.1}}
    folder = written(tmp_path / "adapter", "gpt2", finetune, base="gpt2")
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert list(settings) == sorted(settings)
    assert settings | {} == {
        **settings, "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "lora_dropout": 0.1,
        "target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True, "base_model_name_or_path": "gpt2",
        "rank_pattern": {"c_attn": 12}, "alpha_pattern": {"c_attn": 18}, "bias": "none", "modules_to_save": None,
    }  # fmt: skip
    tensors = load_file(folder / "adapter_model.safetensors")
    b = tensors["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"]
    assert b.shape == (3 * 48, 12)
    blocks = [[bool(part.any()) for part in rows.split(4, dim=1)] for rows in b.split(48)]
    assert blocks == [[True, False, False], [False, True, False], [False, False, True]]


@pytest.mark.parametrize(
    ("name", "targets", "modules", "parameters"),
    [
        ("llama", ["attention.q", "mlp"], ["down_proj", "gate_proj", "q_proj", "up_proj"], None),
        ("llama", ["decoder.layers.1.attention.q"], ["1.self_attn.q_proj"], None),
        ("bert", ["attention.out", "mlp.down"], ["output.dense"], None),
        ("bert", ["attention.out"], ["attention.output.dense"], None),
        ("bert", ["mlp.up"], ["intermediate.dense"], None),
        ("t5", ["cross_attention.q"], ["EncDecAttention.q"], None),
        ("t5", ["attention.q", "attention.out"], ["o", "q"], None),
        ("mixtral", ["attention.q", "experts.down"], ["q_proj"], ["down_proj"]),
        ("mixtral", ["decoder.layers.0.moe.experts.up"], [], ["0.mlp.experts.gate_up_proj"]),
    ],
)
def test_modules_are_named_by_what_fits_no_other(
    name: str, targets: list[str], modules: list[str], parameters: list[str] | None
) -> None:
    adapter = random_adapter(name, {"method": "lora", "lora": {"rank": 2, "targets": targets}})
    config, _ = adapter_files(adapter, None)
    assert (config["target_modules"], config["target_parameters"]) == (modules, parameters)
    again = random_adapter(name, {"method": "lora", "lora": {"targets": targets_of(adapter.pairs(), adapter.model)}})
    assert again.pairs().keys() == adapter.pairs().keys(), "read again, our targets mean the same linears"


def test_short_names() -> None:
    names = ["a.0.q", "a.1.q", "b.0.q", "b.0.wq"]
    assert short_names(["a.0.q", "a.1.q", "b.0.q"], names) == ["q"]
    assert short_names(["a.0.q", "a.1.q", "b.0.q"], names, inside_words=True) == ["0.q", "1.q"]
    assert short_names(["a.0.q"], names) == ["a.0.q"]
    assert short_names(["b.0.wq"], names) == ["wq"]


@pytest.mark.parametrize(
    ("name", "finetune", "says"),
    [
        ("llama", {"method": "full"}, "Try --to hf"),
        ("llama", {"method": "adapter"}, "Try --to adapterhub"),
        ("bert", {"method": "prompt"}, "not for an encoder"),
        ("llama", {"method": "lora", "lora": {"train_also": ["*.attention.q.weight"]}}, "has an update too"),
        (
            "mixtral",
            {"method": "lora", "lora": {"targets": ["attention"], "train_also": ["*.experts.up"]}},
            "of all exp",
        ),
        ("bert", {"method": "lora", "lora": {"train_also": ["mlm.bias"]}}, "cls.predictions has a parameter"),
    ],
)
def test_what_has_no_form_is_refused(name: str, finetune: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        adapter_files(random_adapter(name, finetune), None)


def test_every_family_has_modules_of_the_same_names() -> None:
    """Each is tried against PEFT, so that a new one is."""
    assert {name.split()[0] for name, _ in OURS.values()} == set(FAMILIES) == {name.split()[0] for name in MODELS}
