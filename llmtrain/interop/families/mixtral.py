"""Mixtral in Hugging Face's form: Mistral with a mixture of experts in every layer.

Files have a module per expert, which every reader knows; transformers stacks them when it loads. It can be told to save
them as it has them, stacked, so that form is read too.
"""

from typing import Any

from transformers import MixtralConfig

from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import expert_ffn_size
from llmtrain.interop.families.llama import (
    ATTENTION,
    EMBEDDING,
    END,
    decoder_fields,
    decoder_keys,
    window_fields,
    window_of,
)
from llmtrain.interop.name_table import Row, Shape

TABLE = (
    *EMBEDDING,
    *ATTENTION,
    Row("decoder.layers.{n}.moe.router", "model.layers.{n}.block_sparse_moe.gate"),
    Row("decoder.layers.{n}.moe.experts.gate", "model.layers.{n}.block_sparse_moe.experts.{e}.w1", Shape.EXPERT),
    Row("decoder.layers.{n}.moe.experts.up", "model.layers.{n}.block_sparse_moe.experts.{e}.w3", Shape.EXPERT),
    Row("decoder.layers.{n}.moe.experts.down", "model.layers.{n}.block_sparse_moe.experts.{e}.w2", Shape.EXPERT),
    *END,
)

STACKED_TABLE = (
    *EMBEDDING,
    *ATTENTION,
    Row("decoder.layers.{n}.moe.router", "model.layers.{n}.mlp.gate"),
    Row(
        ("decoder.layers.{n}.moe.experts.gate", "decoder.layers.{n}.moe.experts.up"),
        "model.layers.{n}.mlp.experts.gate_up_proj",
        Shape.STACKED,
    ),
    Row("decoder.layers.{n}.moe.experts.down", "model.layers.{n}.mlp.experts.down_proj", Shape.STACKED),
    *END,
)


def to_config(model: ModelConfig) -> MixtralConfig:
    """The configuration nearest to a model."""
    keys = decoder_keys(model, "MixtralForCausalLM")
    if model.moe is not None:
        keys |= {
            "intermediate_size": expert_ffn_size(model),
            "num_local_experts": model.moe.num_experts,
            "num_experts_per_tok": model.moe.choices,
            "router_aux_loss_coef": model.moe.aux_loss_coeff,
            "router_jitter_noise": model.moe.jitter,
        }
    return MixtralConfig(**keys, sliding_window=window_of(model))


def from_config(config: MixtralConfig) -> tuple[dict[str, Any], list[str]]:
    """The fields of a ModelConfig, and what of the configuration llmtrain cannot express."""
    fields, obstacles = decoder_fields(config)
    fields["moe"] = {
        "router": "top_k",
        "normalize_weights": True,
        "num_experts": config.num_local_experts,
        "top_k": config.num_experts_per_tok,
        "aux_loss_coeff": float(config.router_aux_loss_coef),
        "jitter": float(config.router_jitter_noise),
    }
    return {**fields, "attention": window_fields(config.sliding_window)}, obstacles
