"""GPT-2 in Hugging Face's form: its names, and its configuration both ways."""

from typing import Any

from transformers import GPT2Config

from llmtrain.config.model import ModelConfig
from llmtrain.interop.name_table import Row, Shape

# transformers keeps GPT-2's linears as [in, out] and its three attention inputs in one of them.
TABLE = (
    Row("embeddings.word", "transformer.wte", Shape.VOCABULARY),
    Row("embeddings.position", "transformer.wpe"),
    Row("decoder.layers.{n}.attention_norm", "transformer.h.{n}.ln_1"),
    Row(
        ("decoder.layers.{n}.attention.q", "decoder.layers.{n}.attention.k", "decoder.layers.{n}.attention.v"),
        "transformer.h.{n}.attn.c_attn",
        Shape.FUSED,
    ),
    Row("decoder.layers.{n}.attention.out", "transformer.h.{n}.attn.c_proj", Shape.TRANSPOSED),
    Row("decoder.layers.{n}.mlp_norm", "transformer.h.{n}.ln_2"),
    Row("decoder.layers.{n}.mlp.up", "transformer.h.{n}.mlp.c_fc", Shape.TRANSPOSED),
    Row("decoder.layers.{n}.mlp.down", "transformer.h.{n}.mlp.c_proj", Shape.TRANSPOSED),
    Row("decoder.final_norm", "transformer.ln_f"),
    Row("head", "lm_head", Shape.VOCABULARY),
)

_ACTIVATIONS: dict[str, dict[str, Any]] = {
    "gelu_new": {"activation": "gelu", "gelu_approximate": "tanh"},
    "gelu": {"activation": "gelu", "gelu_approximate": "none"},
    "relu": {"activation": "relu"},
}


def obstacles(model: ModelConfig) -> list[str]:
    """Why GPT-2's configuration cannot express a model; nothing where it can."""
    checks = (
        (model.position == "learned", f"model.position = {model.position}, GPT-2 has learned"),
        (model.norm == "layernorm", f"model.norm = {model.norm}, GPT-2 has layernorm"),
        (model.norm_position == "pre", f"model.norm_position = {model.norm_position}, GPT-2 has pre"),
        (not model.gated, f"model.activation = {model.activation}, GPT-2 has gelu or relu"),
        (model.bias, "model.bias = false, GPT-2 has biases"),
        (
            model.kv_heads == model.num_heads,
            f"model.num_kv_heads = {model.kv_heads}, GPT-2 has num_heads = {model.num_heads}",
        ),
        (
            model.head_size * model.num_heads == model.hidden_size,
            f"model.head_dim = {model.head_size}, GPT-2 has hidden_size / num_heads",
        ),
    )
    return [reason for holds, reason in checks if not holds]


def to_config(model: ModelConfig) -> GPT2Config:
    """The configuration of a model without obstacles."""
    wanted = {"activation": model.activation, "gelu_approximate": model.gelu_approximate}
    activation = next(name for name, fields in _ACTIVATIONS.items() if fields.items() <= wanted.items())
    return GPT2Config(
        vocab_size=model.vocabulary,
        n_positions=model.max_seq_len,
        n_embd=model.hidden_size,
        n_layer=model.num_layers,
        n_head=model.num_heads,
        n_inner=model.ffn_size,
        activation_function=activation,
        resid_pdrop=model.dropout,
        embd_pdrop=model.dropout,
        attn_pdrop=model.attention_dropout,
        layer_norm_epsilon=model.norm_eps,
        initializer_range=model.init.std,
        tie_word_embeddings=model.tie_embeddings,
        architectures=["GPT2LMHeadModel"],
    )


def from_config(config: GPT2Config) -> tuple[dict[str, Any], list[str]]:
    """The fields of a ModelConfig, and what of the configuration llmtrain cannot express."""
    known = ", ".join(_ACTIVATIONS)
    checks = (
        (config.activation_function in _ACTIVATIONS, f"activation_function {config.activation_function}, not {known}"),
        (config.scale_attn_weights, "scale_attn_weights false"),
        (not config.scale_attn_by_inverse_layer_idx, "scale_attn_by_inverse_layer_idx true"),
        (not config.add_cross_attention, "add_cross_attention true"),
    )
    fields: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "max_seq_len": config.n_positions,
        "hidden_size": config.n_embd,
        "num_layers": config.n_layer,
        "num_heads": config.n_head,
        "ffn_hidden_size": config.n_inner or 4 * config.n_embd,
        "dropout": float(config.resid_pdrop),
        "attention_dropout": float(config.attn_pdrop),
        "norm_eps": float(config.layer_norm_epsilon),
        "init": {"std": float(config.initializer_range)},
        "tie_embeddings": config.tie_word_embeddings,
        "position": "learned",
        "norm": "layernorm",
        "bias": True,
        **_ACTIVATIONS.get(config.activation_function, {}),
    }
    return fields, [reason for holds, reason in checks if not holds]
