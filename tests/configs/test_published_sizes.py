"""Every shipped model has the number of parameters that its first line says, and that was published."""

import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import num_active_parameters, num_parameters, parameter_shapes
from llmtrain.models.transformer import build_model

MODELS = Path(__file__).parents[2] / "configs" / "models"

PUBLISHED = {
    "bert-base": 109_514_298, "bert-large": 335_174_458,
    "gpt2-small": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
    "llama-1b": 1_235_814_400, "llama-3b": 3_212_749_824, "llama-8b": 8_030_261_248, "llama-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096, "mixtral-8x7b": 46_702_792_704, "qwen3-0.6b": 596_049_920, "qwen3-8b": 8_190_735_360,
    "t5-small": 60_506_624, "t5-base": 222_903_552, "t5-large": 737_668_096, "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344, "t5-v1.1-small": 76_961_152, "t5-v1.1-base": 247_577_856, "t5-v1.1-large": 783_150_080,
    "t5-v1.1-xl": 2_849_757_184, "t5-v1.1-xxl": 11_135_332_352, "switch-base-8": 619_339_008,
    "switch-base-16": 1_072_397_568, "switch-base-32": 1_978_514_688, "switch-base-64": 3_790_748_928,
    "switch-base-128": 7_415_217_408, "switch-base-256": 14_664_154_368, "switch-large-128": 26_309_291_008,
    "switch-xxl-128": 394_543_476_736,
}  # fmt: skip


def model(name: str) -> ModelConfig:
    return ModelConfig(**YAML(typ="safe", pure=True).load(MODELS / f"{name}.yaml"))


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_preset_has_the_published_number_of_parameters(name: str) -> None:
    config = model(name)
    assert num_parameters(config) == PUBLISHED[name]
    said = re.findall(r"[\d,]{9,}", (MODELS / f"{name}.yaml").read_text("utf-8"))
    assert int(said[0].replace(",", "")) == PUBLISHED[name]


@pytest.mark.parametrize("name", ["bert-base", "llama-1b", "qwen3-0.6b", "mixtral-8x7b", "t5-11b", "switch-base-8"])
def test_the_model_has_what_its_configuration_says(name: str) -> None:
    config = model(name)
    built = {key: tuple(parameter.shape) for key, parameter in build_model(config).named_parameters()}
    assert built == parameter_shapes(config)


def test_every_preset_is_tiny_or_published() -> None:
    assert {file.stem for file in MODELS.glob("*.yaml") if "tiny" not in file.stem} == PUBLISHED.keys()


def test_a_token_meets_the_published_part_of_mixtral() -> None:
    assert num_active_parameters(model("mixtral-8x7b")) == 12_879_925_248
