"""T5 (v1.0 and v1.1) in Hugging Face's form: its names, its configuration both ways, and what Switch shares with it."""

from typing import Any

from transformers import T5Config

from llmtrain.config.model import ModelConfig
from llmtrain.interop.families.activations import GATED, PLAIN, activation_name
from llmtrain.interop.name_table import Row, Shape, Table

FEED_FORWARD = {**PLAIN, **GATED}
DEFAULT_POSITIONS = 512
"""T5 knows no longest sequence; some published configurations name the one that it was trained with."""

WORD = Row("embeddings.word", "shared", Shape.VOCABULARY, copies=("encoder.embed_tokens", "decoder.embed_tokens"))
ENDS: Table = (
    Row("encoder.final_norm", "encoder.final_layer_norm"),
    Row("decoder.final_norm", "decoder.final_layer_norm"),
    Row("head", "lm_head", Shape.VOCABULARY),
)


def layer_rows(stack: str, mlp: Table) -> Table:
    """The rows of one stack's layers; the first of them has the position bias of all.

    `mlp` are the rows behind the norm: their names follow those of the layer and of its last block.
    """
    ours, theirs = f"{stack}.layers.{{n}}", f"{stack}.block.{{n}}.layer"
    blocks = [("attention", "SelfAttention")] + [("cross_attention", "EncDecAttention")] * (stack == "decoder")
    rows = [Row(f"{stack}.position_bias", f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias")]
    for number, (name, module) in enumerate(blocks):
        rows.append(Row(f"{ours}.{name}_norm", f"{theirs}.{number}.layer_norm"))
        rows += [
            Row(f"{ours}.{name}.{part}", f"{theirs}.{number}.{module}.{part[0]}") for part in ("q", "k", "v", "out")
        ]
    rows.append(Row(f"{ours}.mlp_norm", f"{theirs}.{len(blocks)}.layer_norm"))
    rows += [Row(f"{ours}.{row.ours}", f"{theirs}.{len(blocks)}.{row.theirs}", row.shape) for row in mlp]
    return tuple(rows)


_PLAIN_MLP = (Row("mlp.up", "DenseReluDense.wi"), Row("mlp.down", "DenseReluDense.wo"))
_GATED_MLP = (
    Row("mlp.gate", "DenseReluDense.wi_0"),
    Row("mlp.up", "DenseReluDense.wi_1"),
    Row("mlp.down", "DenseReluDense.wo"),
)
TABLE = (WORD, *layer_rows("encoder", _PLAIN_MLP), *layer_rows("decoder", _PLAIN_MLP), *ENDS)
GATED_TABLE = (WORD, *layer_rows("encoder", _GATED_MLP), *layer_rows("decoder", _GATED_MLP), *ENDS)


def limits(model: ModelConfig) -> list[str]:
    """Reasons against a model that T5's configuration could be written for, but has no key to say."""
    if model.tie_embeddings or not model.scaled_head:
        return []
    return ["model.scaled_head = true with model.tie_embeddings = false, T5 scales tied heads only"]


def stack_keys(model: ModelConfig) -> dict[str, Any]:
    """The keys that T5 and Switch share."""
    return {
        "vocab_size": model.vocabulary,
        "n_positions": model.max_seq_len,
        "d_model": model.hidden_size,
        "d_kv": model.head_size,
        "d_ff": model.ffn_size,
        "num_layers": model.encoder_layers or model.num_layers,
        "num_decoder_layers": model.num_layers,
        "num_heads": model.num_heads,
        "relative_attention_num_buckets": model.relative_buckets,
        "relative_attention_max_distance": model.relative_max_distance,
        "dropout_rate": model.dropout,
        "layer_norm_epsilon": model.norm_eps,
        "initializer_factor": model.init.std if model.init.scheme == "t5" else 1.0,
    }


def stack_fields(config: Any) -> dict[str, Any]:
    """The fields of a ModelConfig that follow from those keys."""
    return {
        "family": "encoder_decoder",
        "vocab_size": config.vocab_size,
        "max_seq_len": getattr(config, "n_positions", DEFAULT_POSITIONS),
        "hidden_size": config.d_model,
        "head_dim": config.d_kv,
        "ffn_hidden_size": config.d_ff,
        "num_encoder_layers": config.num_layers,
        "num_layers": config.num_decoder_layers,
        "num_heads": config.num_heads,
        "position": "t5_relative",
        "relative_buckets": config.relative_attention_num_buckets,
        "relative_max_distance": config.relative_attention_max_distance,
        "attention": {"scale": 1.0},
        "dropout": float(config.dropout_rate),
        "attention_dropout": float(config.dropout_rate),
        "norm": "rmsnorm",
        "norm_eps": float(config.layer_norm_epsilon),
        "init": {"scheme": "t5", "std": float(config.initializer_factor), "depth_scaled": False},
        "tie_embeddings": config.tie_word_embeddings,
    }


def to_config(model: ModelConfig) -> T5Config:
    """The configuration nearest to a model."""
    # The class takes this key for whether the head is scaled and then always ties. In the file it says what it means,
    # which all readers understand: where both matrices are there and differ, transformers does not tie either.
    scaled: dict[str, Any] = {"tie_word_embeddings": model.scaled_head}
    config = T5Config(
        **stack_keys(model),
        **scaled,
        feed_forward_proj=activation_name(model, FEED_FORWARD),
        architectures=["T5ForConditionalGeneration"],
    )
    config.tie_word_embeddings = model.tie_embeddings
    return config


def from_config(config: T5Config) -> tuple[dict[str, Any], list[str]]:
    """The fields of a ModelConfig, and what of the configuration llmtrain cannot express."""
    kind = config.feed_forward_proj
    checks = (
        (kind in FEED_FORWARD, f"feed_forward_proj {kind}, not {', '.join(FEED_FORWARD)}"),
        (not config.is_decoder, "is_decoder true"),
    )
    fields = {**stack_fields(config), "scaled_head": config.scale_decoder_outputs, **FEED_FORWARD.get(kind, {})}
    return fields, [reason for holds, reason in checks if not holds]
