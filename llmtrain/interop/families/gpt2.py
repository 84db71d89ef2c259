"""GPT-2 in Hugging Face's form: its names, and its configuration both ways."""

from typing import Any

from transformers import GPT2Config

from llmtrain.config.model import ModelConfig
from llmtrain.interop.families.activations import PLAIN, activation_name
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


def to_config(model: ModelConfig) -> GPT2Config:
    """The configuration nearest to a model."""
    return GPT2Config(
        vocab_size=model.vocabulary,
        n_positions=model.max_seq_len,
        n_embd=model.hidden_size,
        n_layer=model.num_layers,
        n_head=model.num_heads,
        n_inner=model.ffn_size,
        activation_function=activation_name(model, PLAIN),
        resid_pdrop=model.dropout,
        embd_pdrop=model.dropout,
        attn_pdrop=model.attention_dropout,
        layer_norm_epsilon=model.norm_eps,
        initializer_range=model.init.std,
        tie_word_embeddings=model.tie_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        architectures=["GPT2LMHeadModel"],
    )


def from_config(config: GPT2Config) -> tuple[dict[str, Any], list[str]]:
    """The fields of a ModelConfig, and what of the configuration llmtrain cannot express."""
    known = ", ".join(PLAIN)
    checks = (
        (config.activation_function in PLAIN, f"activation_function {config.activation_function}, not {known}"),
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
        **PLAIN.get(config.activation_function, {}),
    }
    return fields, [reason for holds, reason in checks if not holds]
