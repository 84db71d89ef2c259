"""Families of models that Hugging Face's transformers knows: which one fits, and configurations both ways."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from transformers import PretrainedConfig

from llmtrain.config.model import ModelConfig
from llmtrain.errors import ConfigError
from llmtrain.interop import gpt2, llama
from llmtrain.interop.name_table import Row


@dataclass(frozen=True)
class Family:
    """One family: its names, and what its configuration can express."""

    title: str
    table: Sequence[Row]
    prefix: str
    """Of the tensors in transformers' model; some published folders leave it out."""
    config_class: type[PretrainedConfig]
    obstacles: Callable[[ModelConfig], list[str]]
    to_config: Callable[[ModelConfig], PretrainedConfig]
    from_config: Callable[[Any], tuple[dict[str, Any], list[str]]]


FAMILIES = {
    "gpt2": Family(
        "GPT-2", gpt2.TABLE, "transformer.", gpt2.GPT2Config, gpt2.obstacles, gpt2.to_config, gpt2.from_config
    ),
    "llama": Family(
        "Llama", llama.TABLE, "model.", llama.LlamaConfig, llama.obstacles, llama.to_config, llama.from_config
    ),
}
"""By transformers' `model_type`."""


@dataclass(frozen=True)
class SpecialTokens:
    """Ids that a Hugging Face configuration carries; None where a tokenizer has no such token."""

    eos_id: int
    bos_id: int | None = None
    pad_id: int | None = None


def family_for(model: ModelConfig) -> Family:
    """The family that expresses a model. Raises ConfigError with every reason against each family."""
    against = {family.title: family.obstacles(model) for family in FAMILIES.values()}
    fitting = [family for family in FAMILIES.values() if not against[family.title]]
    if fitting:
        return fitting[0]
    reasons = "\n".join(f"  {title}: {'; '.join(found)}." for title, found in against.items())
    raise ConfigError(
        f"No Hugging Face family expresses this model:\n{reasons}\n"
        "Only models whose every reason is settled for one family can be exported; train such a model to export it."
    )


def hf_config(model: ModelConfig, tokens: SpecialTokens) -> PretrainedConfig:
    """transformers' configuration of a model. Raises ConfigError where no family fits."""
    config = family_for(model).to_config(model)
    config.eos_token_id, config.bos_token_id, config.pad_token_id = tokens.eos_id, tokens.bos_id, tokens.pad_id
    return config


def model_config(config: PretrainedConfig) -> ModelConfig:
    """The model that a configuration of a known family describes. Raises ConfigError with every obstacle."""
    fields, obstacles = FAMILIES[config.model_type].from_config(config)
    if getattr(config, "quantization_config", None) is not None:
        obstacles.append("quantization_config is set: the weights are quantized")
    if obstacles:
        raise ConfigError(f"This {config.model_type} model cannot be imported: {'; '.join(obstacles)}.")
    try:
        return ModelConfig(**fields)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise ConfigError(f"This {config.model_type} model cannot be imported: {faults}.") from None


def parse_config(content: Mapping[str, Any], where: str) -> PretrainedConfig:
    """The configuration in a config.json. Raises ConfigError for a family that is not known, or wrong values."""
    kind = content.get("model_type")
    if kind not in FAMILIES:
        raise ConfigError(f"{where}: model_type = {kind}: can import {', '.join(FAMILIES)}.")
    try:
        return FAMILIES[kind].config_class.from_dict(dict(content))
    except Exception as error:  # transformers validates with several libraries and no common class of error
        raise ConfigError(f"{where}: transformers refuses this configuration: {error}") from error
