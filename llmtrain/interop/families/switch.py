"""Switch Transformers in Hugging Face's form: T5 with a mixture of experts in every n-th layer of both stacks."""

from dataclasses import replace
from typing import Any

from transformers import SwitchTransformersConfig

from llmtrain.config.model import ModelConfig
from llmtrain.interop.families.activations import PLAIN, activation_name
from llmtrain.interop.families.t5 import ENDS, WORD, layer_rows, stack_fields, stack_keys
from llmtrain.interop.name_table import Row, Shape

_MLP = (
    Row("mlp.up", "mlp.wi"),
    Row("mlp.down", "mlp.wo"),
    Row("moe.router", "mlp.router.classifier"),
    Row("moe.experts.up", "mlp.experts.expert_{e}.wi", Shape.EXPERT),
    Row("moe.experts.down", "mlp.experts.expert_{e}.wo", Shape.EXPERT),
)
# Where the head is not tied, transformers ties nothing: both stacks then read an embedding of their own.
_WORD = replace(WORD, written_untied=True)
TABLE = (_WORD, *layer_rows("encoder", _MLP), *layer_rows("decoder", _MLP), *ENDS)


def limits(model: ModelConfig) -> list[str]:
    """Reasons against a model: Switch's configuration has no form for it."""
    return [] if model.moe else ["model.moe = null, Switch Transformers has experts"]


def to_config(model: ModelConfig) -> SwitchTransformersConfig:
    """The configuration nearest to a model. Its capacity is per sequence: with room for the longest none is dropped, as
    in llmtrain's evaluation."""
    moe = model.moe
    assert moe is not None, "limits() says so"
    config = SwitchTransformersConfig(
        **stack_keys(model),
        dense_act_fn=activation_name(model, PLAIN),
        tie_word_embeddings=model.tie_embeddings,
        num_sparse_encoder_layers=sum(map(model.has_experts, range(model.encoder_layers))),
        num_sparse_decoder_layers=sum(map(model.has_experts, range(model.decoder_layers))),
        num_experts=moe.num_experts,
        expert_capacity=model.max_seq_len,
        router_bias=False,
        router_jitter_noise=moe.jitter,
        router_aux_loss_coef=moe.aux_loss_coeff,
        router_z_loss_coef=moe.z_loss_coeff,
        architectures=["SwitchTransformersForConditionalGeneration"],
    )
    # The class divides layers by numbers of layers, which does not always give the distance; a file may name it.
    config.encoder_sparse_step = config.decoder_sparse_step = moe.every_n_layers
    return config


def from_config(config: SwitchTransformersConfig) -> tuple[dict[str, Any], list[str]]:
    """The fields of a ModelConfig, and what of the configuration llmtrain cannot express."""
    every: tuple[int, int] = (config.encoder_sparse_step, config.decoder_sparse_step)
    checks = (
        (config.dense_act_fn in PLAIN, f"dense_act_fn {config.dense_act_fn}, not {', '.join(PLAIN)}"),
        (not config.router_bias, "router_bias true"),
        (every[0] == every[1], f"encoder_sparse_step {every[0]} and decoder_sparse_step {every[1]} differ"),
        (every[0] > 0, f"encoder_sparse_step {every[0]}, not 1 or more"),
        (not config.is_decoder, "is_decoder true"),
    )
    moe = {
        "router": "switch",
        "num_experts": config.num_experts,
        "top_k": 1,
        "every_n_layers": max(1, every[0]),
        "jitter": float(config.router_jitter_noise),
        "aux_loss_coeff": float(config.router_aux_loss_coef),
        "z_loss_coeff": float(config.router_z_loss_coef),
    }
    fields = {**stack_fields(config), "moe": moe, "scaled_head": config.tie_word_embeddings}
    return {**fields, **PLAIN.get(config.dense_act_fn, {})}, [reason for holds, reason in checks if not holds]
