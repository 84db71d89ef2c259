"""Mistral in Hugging Face's form: Llama with a window, under the same names."""

from typing import Any

from transformers import MistralConfig

from llmtrain.config.model import ModelConfig
from llmtrain.interop.families.llama import decoder_fields, decoder_keys, window_fields, window_of


def to_config(model: ModelConfig) -> MistralConfig:
    """The configuration nearest to a model."""
    return MistralConfig(**decoder_keys(model, "MistralForCausalLM"), sliding_window=window_of(model))


def from_config(config: MistralConfig) -> tuple[dict[str, Any], list[str]]:
    """The fields of a ModelConfig, and what of the configuration llmtrain cannot express."""
    fields, obstacles = decoder_fields(config)
    if getattr(config, "layer_types", None):
        obstacles.append("layer_types: its layers differ")
    return {**fields, "attention": window_fields(config.sliding_window)}, obstacles
