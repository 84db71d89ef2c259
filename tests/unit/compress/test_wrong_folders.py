"""Quantized folders of others, damaged and hostile ones: read right, or refused with a reason."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmtrain.errors import ConfigError, DataError, LlmtrainError
from llmtrain.infer.hugging_face import import_folder
from llmtrain.interop.compressed.form import WHOLE
from llmtrain.interop.compressed.tensors import unpacked
from llmtrain.interop.hf_import import open_hf_folder
from llmtrain.models.transformer import Transformer
from llmtrain.values.quantization import NumberGrid, round_to_nearest
from tests.unit.compress.quantized import quantize
from tests.unit.interop.models import LLAMA, MIXTRAL, random_model

Tensors = dict[str, Tensor]
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(LLAMA)


@pytest.fixture(scope="module")
def folders(model, small_tokenizer, text_file, tmp_path_factory) -> dict[str, Path]:
    """A folder of each format; what no export has written says nothing of its hashes."""
    found = {}
    for scheme in ("w4a16", "w8a8"):
        found[scheme] = tmp_path_factory.mktemp("good") / scheme
        quantize(model, small_tokenizer, found[scheme], text_file, scheme)
        (found[scheme] / "llmtrain.json").unlink()
    return found


def _spoiled(good: Path, out: Path, tensors: Callable[[Tensors], Any], section: Callable[[dict], Any]) -> Path:
    shutil.copytree(good, out)
    stored = load_file(out / "model.safetensors")
    tensors(stored)
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    section(config["quantization_config"])
    (out / "config.json").write_text(json.dumps(config))
    return out


def _nothing(found: Any) -> None:
    pass


def _scale(value: float) -> Callable[[Tensors], None]:
    def change(stored: Tensors) -> None:
        stored[f"{Q}_scale"][3, 1] = value

    return change


def _shape(*shape: int) -> Callable[[Tensors], None]:
    return lambda stored: stored.update({f"{Q}_shape": torch.tensor(shape)})


def _changed(part: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    return lambda stored: stored.update({f"{Q}_{part}": change(stored[f"{Q}_{part}"])})


TENSORS = {
    "scale NaN": (_scale(float("nan")), "no positive numbers"),
    "scale inf": (_scale(float("inf")), "no positive numbers"),
    "scale zero": (_scale(0.0), "no positive numbers"),
    "scale negative": (_scale(-1.0), "no positive numbers"),
    "scale missing": (lambda stored: stored.pop(f"{Q}_scale"), "weight_scale is missing"),
    "numbers missing": (lambda stored: stored.pop(f"{Q}_packed"), "weight_packed is missing"),
    "shape missing": (lambda stored: stored.pop(f"{Q}_shape"), "weight_shape is missing"),
    "all missing": (
        lambda stored: [stored.pop(f"{Q}_{part}") for part in ("packed", "scale", "shape")],
        "q_proj.weight: is missing",
    ),
    "shape lies": (_shape(48, 40), "has the shape|do not make a matrix|needs"),
    "shape is huge": (_shape(48, 1 << 40), "do not make a matrix"),
    "shape is negative": (_shape(-48, 48), "do not make a matrix"),
    "shape is zero": (_shape(0, 0), "do not make a matrix"),
    "shape has three": (_shape(1, 48, 48), "two whole numbers"),
    "shape in floats": (lambda stored: stored.update({f"{Q}_shape": torch.tensor([48.0, 48.0])}), "two whole numbers"),
    "numbers cut": (_changed("packed", lambda words: words[:, :-1]), "do not make a matrix"),
    "numbers of another type": (_changed("packed", Tensor.long), "numbers are I64"),
    "scales of another type": (_changed("scale", Tensor.int), "scales are I32"),
    "scales of other groups": (_changed("scale", lambda scale: scale[:, :1]), "needs"),
    "weight beside it": (lambda stored: stored.update({Q: torch.zeros(48, 48)}), "weight is none of it"),
    "zero points": (
        lambda stored: stored.update({f"{Q}_zero_point": torch.zeros(48, 3)}), "another value than zero",
    ),
    "another order": (
        lambda stored: stored.update({f"{Q}_g_idx": torch.zeros(48, dtype=torch.int32)}), "columns in another order",
    ),
    "an unknown matrix": (
        lambda stored: stored.update({name.replace("s.1", "s.7"): stored[name].clone() for name in [*stored]}),
        "does not ask for it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", TENSORS)
def test_damaged_tensors(kind, folders, tmp_path):
    change, told = TENSORS[kind]
    folder = _spoiled(folders["w4a16"], tmp_path / "spoiled", change, _nothing)
    with pytest.raises(DataError, match=told):
        import_folder(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _weights(section: dict[str, Any]) -> dict[str, Any]:
    return section["config_groups"]["group_0"]["weights"]


def _put(place: Callable[[dict[str, Any]], dict[str, Any]], **keys: Any) -> Callable[[dict[str, Any]], None]:
    return lambda section: place(section).update(keys)


def _itself(section: dict[str, Any]) -> dict[str, Any]:
    return section


SECTIONS = {
    "wrong format name": (_put(_itself, format="int-quantized"), "must be pack-quantized without input_activations"),
    "another method": (_put(_itself, quant_method="gptq"), "another method than compressed-tensors"),
    "other bits": (_put(_weights, num_bits=3), "num_bits = 3: must be 4 or 8"),
    "eight bits that are four": (_put(_weights, num_bits=8), "do not make a matrix"),
    "bits as text": (_put(_weights, num_bits="4"), "must be 4 or 8"),
    "asymmetric": (_put(_weights, symmetric=False), "symmetric = False"),
    "floats": (_put(_weights, type="float"), "type = 'float'"),
    "a group of none": (_put(_weights, group_size=0), "group_size = 0"),
    "a group that does not divide": (_put(_weights, group_size=13), "groups of 13 do not divide"),
    "another group": (_put(_weights, group_size=8), "needs"),
    "by channel": (_put(_weights, strategy="channel"), "needs"),
    "blocks": (_put(_weights, strategy="block", block_structure=[16, 16]), "strategy = 'block'"),
    "ordered": (_put(_weights, actorder="weight"), "actorder"),
    "not compressed": (_put(_itself, quantization_status="frozen"), "quantization_status"),
    "keys and values": (_put(_itself, kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
    "no groups": (_put(_itself, config_groups={}), "must be one group"),
    "groups as a list": (_put(_itself, config_groups=[1]), "must be one group"),
    "two groups": (lambda section: section["config_groups"].update(b={}), "must be one group"),
    "inputs are rounded": (
        lambda section: section["config_groups"]["group_0"].update(input_activations={"num_bits": 8}),
        "input_activations.type",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SECTIONS)
def test_wrong_settings(kind, folders, tmp_path):
    change, told = SECTIONS[kind]
    folder = _spoiled(folders["w4a16"], tmp_path / "spoiled", _nothing, change)
    with pytest.raises((ConfigError, DataError), match=told):
        open_hf_folder(folder)


def test_int8_without_its_scale_and_as_another_format(folders, tmp_path):
    good = folders["w8a8"]
    with pytest.raises(DataError, match=r"weight_scale is missing|is stored as I8"):
        open_hf_folder(_spoiled(good, tmp_path / "one", lambda stored: stored.pop(f"{Q}_scale"), _nothing))
    with pytest.raises(ConfigError, match="must be int-quantized with input_activations"):
        open_hf_folder(_spoiled(good, tmp_path / "two", _nothing, _put(_itself, format="pack-quantized")))
    group = _put(lambda section: section["config_groups"]["group_0"], input_activations=None)
    with pytest.raises(LlmtrainError, match="pack-quantized"):
        open_hf_folder(_spoiled(good, tmp_path / "three", _nothing, group))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_file_that_is_cut(share, folders, tmp_path):
    folder = _spoiled(folders["w4a16"], tmp_path / "cut", _nothing, _nothing)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match="no valid safetensors"):
        import_folder(folder, tmp_path / "out")


def test_no_section_is_not_read_as_plain_weights(folders, tmp_path):
    folder = _spoiled(folders["w4a16"], tmp_path / "plain", _nothing, _nothing)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"does not ask for it|is missing"):
        open_hf_folder(folder)


def test_plain_weights_are_not_read_as_quantized(folders, tmp_path):
    def plain(stored: Tensors) -> None:
        for name in [name for name in stored if name.endswith("weight_packed")]:
            base = name.removesuffix("_packed")
            stored[base] = torch.zeros(stored.pop(f"{base}_shape").tolist())
            del stored[name], stored[f"{base}_scale"]

    with pytest.raises(DataError, match="and none is"):
        open_hf_folder(_spoiled(folders["w4a16"], tmp_path / "plain", plain, _nothing))


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8"])
def test_a_good_one_is_imported_and_says_what_it_is(scheme, folders, tmp_path):
    imported = import_folder(folders[scheme], tmp_path / "out")
    assert any("-bit weights" in note and "dequantized" in note for note in imported.folder.notes)
    assert "quantization_config" not in " ".join(imported.folder.notes)


def _rounding(stored: Tensors) -> None:
    """Packed numbers of 8 bits in the format of rounded inputs: one in each int8."""
    for name in [name for name in stored if name.endswith("_packed")]:
        base = name.removesuffix("_packed")
        stored[base] = unpacked(stored.pop(name), 8, stored.pop(f"{base}_shape").tolist()[1])


def _rounded(section: dict[str, Any]) -> None:
    section["format"] = WHOLE
    section["config_groups"]["group_0"]["input_activations"] = {
        "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
    }  # fmt: skip


def _quantize(stored: Tensors, name: str) -> None:
    made = round_to_nearest(stored[name].float(), NumberGrid(8))
    stored[name], stored[f"{name}_scale"] = made.numbers_OI, made.scale_OG


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_rounded_inputs_of_what_is_no_linear_of_a_layer_are_refused(name, folders, tmp_path):
    """Others quantize heads too. Theirs are multiplied here without a module whose inputs could be rounded."""
    folder = _spoiled(folders["w8a8"], tmp_path / "spoiled", lambda stored: _quantize(stored, name), _nothing)
    with pytest.raises(ConfigError, match=rf"rounds what goes into {name} \(input_activations\)"):
        import_folder(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rounded_inputs_of_experts_are_refused(small_tokenizer, text_file, tmp_path):
    """Those of the attention beside them are not."""
    quantize(random_model(MIXTRAL), small_tokenizer, tmp_path / "good", text_file, "w8a16")
    (tmp_path / "good" / "llmtrain.json").unlink()
    with pytest.raises(ConfigError, match=r"rounds what goes into \S+experts\S+ and \d+ more"):
        open_hf_folder(_spoiled(tmp_path / "good", tmp_path / "all", _rounding, _rounded))

    def without_experts(stored: Tensors) -> None:
        _rounding(stored)
        for name in [name for name in stored if ".experts." in name and name.endswith("_scale")]:
            base = name.removesuffix("_scale")
            stored[base] = stored[base].float() * stored.pop(name)

    folder = open_hf_folder(_spoiled(tmp_path / "good", tmp_path / "some", without_experts, _rounded))
    assert folder.rounded_inputs == {
        f"decoder.layers.{layer}.attention.{part}" for layer in range(2) for part in ("q", "k", "v", "out")
    }
