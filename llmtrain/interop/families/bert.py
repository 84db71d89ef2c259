"""BERT with its masked-language-model head in Hugging Face's form: its names, and its configuration both ways."""

from typing import Any

from transformers import BertConfig

from llmtrain.config.model import ModelConfig
from llmtrain.interop.families.activations import PLAIN, activation_name
from llmtrain.interop.name_table import Row, Shape

# The norms stand behind the sums. The bias of the logits belongs to the head; its matrix has a copy of it, which is the
# one that transformers uses where the head is not tied.
TABLE = (
    Row("embeddings.word", "bert.embeddings.word_embeddings", Shape.VOCABULARY),
    Row("embeddings.position", "bert.embeddings.position_embeddings"),
    Row("embeddings.token_type", "bert.embeddings.token_type_embeddings"),
    Row("embeddings.norm", "bert.embeddings.LayerNorm"),
    Row("encoder.layers.{n}.attention.q", "bert.encoder.layer.{n}.attention.self.query"),
    Row("encoder.layers.{n}.attention.k", "bert.encoder.layer.{n}.attention.self.key"),
    Row("encoder.layers.{n}.attention.v", "bert.encoder.layer.{n}.attention.self.value"),
    Row("encoder.layers.{n}.attention.out", "bert.encoder.layer.{n}.attention.output.dense"),
    Row("encoder.layers.{n}.attention_norm", "bert.encoder.layer.{n}.attention.output.LayerNorm"),
    Row("encoder.layers.{n}.mlp.up", "bert.encoder.layer.{n}.intermediate.dense"),
    Row("encoder.layers.{n}.mlp.down", "bert.encoder.layer.{n}.output.dense"),
    Row("encoder.layers.{n}.mlp_norm", "bert.encoder.layer.{n}.output.LayerNorm"),
    Row("mlm.dense", "cls.predictions.transform.dense"),
    Row("mlm.norm", "cls.predictions.transform.LayerNorm"),
    Row("mlm", "cls.predictions", Shape.VOCABULARY, copies=("cls.predictions.decoder",), written_untied=True),
    Row("head", "cls.predictions.decoder", Shape.VOCABULARY),
)


_OLDER: dict[str, Any] = {"position_embedding_type": "absolute"}
"""transformers 5 knows no other kind, but readers that came with transformers 4 ask for it."""


def to_config(model: ModelConfig) -> BertConfig:
    """The configuration nearest to a model."""
    return BertConfig(
        vocab_size=model.vocabulary,
        max_position_embeddings=model.max_seq_len,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        hidden_act=activation_name(model, PLAIN),
        hidden_dropout_prob=model.dropout,
        attention_probs_dropout_prob=model.attention_dropout,
        type_vocab_size=max(1, model.token_types),
        layer_norm_eps=model.norm_eps,
        initializer_range=model.init.std,
        tie_word_embeddings=model.tie_embeddings,
        **_OLDER,
        architectures=["BertForMaskedLM"],
    )


def from_config(config: BertConfig) -> tuple[dict[str, Any], list[str]]:
    """The fields of a ModelConfig, and what of the configuration llmtrain cannot express."""
    position = getattr(config, "position_embedding_type", "absolute")
    checks = (
        (config.hidden_act in PLAIN, f"hidden_act {config.hidden_act}, not {', '.join(PLAIN)}"),
        (position == "absolute", f"position_embedding_type {position}, not absolute"),
        (config.type_vocab_size > 0, f"type_vocab_size {config.type_vocab_size}, not 1 or more"),
        (not config.is_decoder, "is_decoder true"),
        (not config.add_cross_attention, "add_cross_attention true"),
    )
    fields: dict[str, Any] = {
        "family": "encoder",
        "vocab_size": config.vocab_size,
        "max_seq_len": config.max_position_embeddings,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "dropout": float(config.hidden_dropout_prob),
        "attention_dropout": float(config.attention_probs_dropout_prob),
        "token_types": config.type_vocab_size,
        "embedding_norm": True,
        "norm": "layernorm",
        "norm_position": "post",
        "norm_eps": float(config.layer_norm_eps),
        "init": {"std": float(config.initializer_range), "depth_scaled": False},
        "tie_embeddings": config.tie_word_embeddings,
        "position": "learned",
        "bias": True,
        "head": "mlm",
        **PLAIN.get(config.hidden_act, {}),
    }
    return fields, [reason for holds, reason in checks if not holds]
