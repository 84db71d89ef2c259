"""Qwen3 in Hugging Face's form: Llama with norms on queries and keys."""

from typing import Any

from transformers import Qwen3Config

from llmtrain.config.model import ModelConfig
from llmtrain.interop.families.llama import (
    ATTENTION,
    EMBEDDING,
    END,
    MLP,
    decoder_fields,
    decoder_keys,
    window_fields,
    window_of,
)
from llmtrain.interop.name_table import Row

TABLE = (
    *EMBEDDING,
    *ATTENTION,
    Row("decoder.layers.{n}.attention.q_norm", "model.layers.{n}.self_attn.q_norm"),
    Row("decoder.layers.{n}.attention.k_norm", "model.layers.{n}.self_attn.k_norm"),
    *MLP,
    *END,
)


def to_config(model: ModelConfig) -> Qwen3Config:
    """The configuration nearest to a model."""
    window = window_of(model)
    return Qwen3Config(
        **decoder_keys(model, "Qwen3ForCausalLM"),
        attention_bias=False,
        use_sliding_window=window is not None,
        sliding_window=window,
        max_window_layers=model.num_layers if window is None else 0,
    )


def from_config(config: Qwen3Config) -> tuple[dict[str, Any], list[str]]:
    """The fields of a ModelConfig, and what of the configuration llmtrain cannot express."""
    fields, obstacles = decoder_fields(config)
    kinds = set(config.layer_types or ())
    if config.attention_bias:
        obstacles.append("attention_bias true: llmtrain has biases in the MLP too, or none")
    if len(kinds) > 1:
        obstacles.append("layer_types: some layers have a window and some have none")
    window = config.sliding_window if kinds == {"sliding_attention"} else None
    return {**fields, "qk_norm": True, "attention": window_fields(window)}, obstacles
