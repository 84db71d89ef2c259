"""Llama in Hugging Face's form: its names, and its configuration both ways."""

from typing import Any

from transformers import LlamaConfig

from llmtrain.config.model import ModelConfig
from llmtrain.interop.name_table import Row, Shape

# Both sides turn the pairs (x[i], x[i + D/2]), so queries and keys keep their order.
TABLE = (
    Row("embeddings.word", "model.embed_tokens", Shape.VOCABULARY),
    Row("decoder.layers.{n}.attention_norm", "model.layers.{n}.input_layernorm"),
    Row("decoder.layers.{n}.attention.q", "model.layers.{n}.self_attn.q_proj"),
    Row("decoder.layers.{n}.attention.k", "model.layers.{n}.self_attn.k_proj"),
    Row("decoder.layers.{n}.attention.v", "model.layers.{n}.self_attn.v_proj"),
    Row("decoder.layers.{n}.attention.out", "model.layers.{n}.self_attn.o_proj"),
    Row("decoder.layers.{n}.mlp_norm", "model.layers.{n}.post_attention_layernorm"),
    Row("decoder.layers.{n}.mlp.gate", "model.layers.{n}.mlp.gate_proj"),
    Row("decoder.layers.{n}.mlp.up", "model.layers.{n}.mlp.up_proj"),
    Row("decoder.layers.{n}.mlp.down", "model.layers.{n}.mlp.down_proj"),
    Row("decoder.final_norm", "model.norm"),
    Row("head", "lm_head", Shape.VOCABULARY),
)


def obstacles(model: ModelConfig) -> list[str]:
    """Why Llama's configuration cannot express a model; nothing where it can."""
    checks = (
        (model.position == "rope", f"model.position = {model.position}, Llama has rope"),
        (model.norm == "rmsnorm", f"model.norm = {model.norm}, Llama has rmsnorm"),
        (model.norm_position == "pre", f"model.norm_position = {model.norm_position}, Llama has pre"),
        # transformers would take other activations, but other readers of the format do not.
        (model.activation == "swiglu", f"model.activation = {model.activation}, Llama has swiglu"),
        (
            model.hidden_size % model.num_heads == 0,
            f"model.num_heads = {model.num_heads}, in Llama it divides hidden_size = {model.hidden_size}",
        ),
    )
    return [reason for holds, reason in checks if not holds]


def to_config(model: ModelConfig) -> LlamaConfig:
    """The configuration of a model without obstacles."""
    return LlamaConfig(
        vocab_size=model.vocabulary,
        max_position_embeddings=model.max_seq_len,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_size,
        rms_norm_eps=model.norm_eps,
        rope_parameters=_rope_parameters(model),
        attention_bias=model.bias,
        mlp_bias=model.bias,
        attention_dropout=model.attention_dropout,
        initializer_range=model.init.std,
        tie_word_embeddings=model.tie_embeddings,
        architectures=["LlamaForCausalLM"],
    )


def from_config(config: LlamaConfig) -> tuple[dict[str, Any], list[str]]:
    """The fields of a ModelConfig, and what of the configuration llmtrain cannot express."""
    rope: dict[str, Any] = dict(config.rope_parameters or {})
    kind = rope.get("rope_type", "default")
    checks = (
        (config.hidden_act == "silu", f"hidden_act {config.hidden_act}, not silu"),
        (kind in ("default", "llama3"), f"rope_type {kind}, not default or llama3"),
        (rope.get("partial_rotary_factor", 1.0) == 1.0, "partial_rotary_factor other than 1"),
        (config.attention_bias == config.mlp_bias, "attention_bias and mlp_bias differ"),
    )
    fields: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "max_seq_len": config.max_position_embeddings,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "norm_eps": float(config.rms_norm_eps),
        "rope_theta": float(rope.get("rope_theta", 10000.0)),
        "rope_scaling": _scaling(rope) if kind == "llama3" else None,
        "bias": config.attention_bias,
        "attention_dropout": float(config.attention_dropout or 0.0),
        "init": {"std": float(config.initializer_range)},
        "tie_embeddings": config.tie_word_embeddings,
        "position": "rope",
        "norm": "rmsnorm",
        "activation": "swiglu",
    }
    return fields, [reason for holds, reason in checks if not holds]


def _rope_parameters(model: ModelConfig) -> dict[str, Any]:
    scaling = model.rope_scaling
    if scaling is None:
        return {"rope_type": "default", "rope_theta": model.rope_theta}
    return {
        "rope_type": "llama3",
        "rope_theta": model.rope_theta,
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_seq_len,
    }


def _scaling(rope: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": "llama3",
        "factor": float(rope["factor"]),
        "low_freq_factor": float(rope["low_freq_factor"]),
        "high_freq_factor": float(rope["high_freq_factor"]),
        "original_max_seq_len": rope["original_max_position_embeddings"],
    }
