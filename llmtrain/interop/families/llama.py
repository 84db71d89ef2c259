"""Llama in Hugging Face's form: its names, its configuration both ways, and what other decoders share with it."""

from typing import Any

from transformers import LlamaConfig

from llmtrain.config.model import ModelConfig
from llmtrain.interop.families.rotary import rope_fields, rope_parameters
from llmtrain.interop.name_table import Row, Shape, Table

# Both sides turn the pairs (x[i], x[i + D/2]), so queries and keys keep their order.
EMBEDDING: Table = (Row("embeddings.word", "model.embed_tokens", Shape.VOCABULARY),)
ATTENTION: Table = (
    Row("decoder.layers.{n}.attention_norm", "model.layers.{n}.input_layernorm"),
    Row("decoder.layers.{n}.attention.q", "model.layers.{n}.self_attn.q_proj"),
    Row("decoder.layers.{n}.attention.k", "model.layers.{n}.self_attn.k_proj"),
    Row("decoder.layers.{n}.attention.v", "model.layers.{n}.self_attn.v_proj"),
    Row("decoder.layers.{n}.attention.out", "model.layers.{n}.self_attn.o_proj"),
    Row("decoder.layers.{n}.mlp_norm", "model.layers.{n}.post_attention_layernorm"),
)
MLP: Table = (
    Row("decoder.layers.{n}.mlp.gate", "model.layers.{n}.mlp.gate_proj"),
    Row("decoder.layers.{n}.mlp.up", "model.layers.{n}.mlp.up_proj"),
    Row("decoder.layers.{n}.mlp.down", "model.layers.{n}.mlp.down_proj"),
)
END: Table = (Row("decoder.final_norm", "model.norm"), Row("head", "lm_head", Shape.VOCABULARY))

TABLE = (*EMBEDDING, *ATTENTION, *MLP, *END)


def limits(model: ModelConfig) -> list[str]:
    """Reasons against a model that Llama's configuration gives by itself."""
    if model.hidden_size % model.num_heads == 0:
        return []
    return [f"model.num_heads = {model.num_heads}, in Llama it divides hidden_size = {model.hidden_size}"]


def decoder_keys(model: ModelConfig, architecture: str) -> dict[str, Any]:
    """The keys that all decoders of this kind have."""
    return {
        "vocab_size": model.vocabulary,
        "max_position_embeddings": model.max_seq_len,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_size,
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": rope_parameters(model),
        "attention_dropout": model.attention_dropout,
        "initializer_range": model.init.std,
        "tie_word_embeddings": model.tie_embeddings,
        "architectures": [architecture],
    }


def decoder_fields(config: Any) -> tuple[dict[str, Any], list[str]]:
    """The fields of a ModelConfig that follow from those keys, and what llmtrain cannot express of them."""
    rope, obstacles = rope_fields(config)
    # transformers would take other activations, but other readers of the format do not.
    if config.hidden_act != "silu":
        obstacles.append(f"hidden_act {config.hidden_act}, not silu")
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
        "attention_dropout": float(config.attention_dropout or 0.0),
        "init": {"std": float(config.initializer_range)},
        "tie_embeddings": config.tie_word_embeddings,
        "norm": "rmsnorm",
        "activation": "swiglu",
        **rope,
    }
    return fields, obstacles


def window_of(model: ModelConfig) -> int | None:
    """`sliding_window` of the configurations that have it."""
    return model.attention.window if model.attention.kind == "sliding_window" else None


def window_fields(window: int | None) -> dict[str, Any]:
    """The attention section that a `sliding_window` asks for: on both sides a query sees itself and window - 1 keys."""
    return {"kind": "full"} if window is None else {"kind": "sliding_window", "window": window}


def to_config(model: ModelConfig) -> LlamaConfig:
    """The configuration nearest to a model."""
    keys = decoder_keys(model, "LlamaForCausalLM")
    return LlamaConfig(**keys, attention_bias=model.bias, mlp_bias=model.bias)


def from_config(config: LlamaConfig) -> tuple[dict[str, Any], list[str]]:
    """The fields of a ModelConfig, and what of the configuration llmtrain cannot express."""
    fields, obstacles = decoder_fields(config)
    if config.attention_bias != config.mlp_bias:
        obstacles.append("attention_bias and mlp_bias differ")
    return {**fields, "bias": config.attention_bias}, obstacles
