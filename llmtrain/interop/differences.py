"""Differences between a model and another description of it: the values that have an effect, compared.

A family's configuration is made from a model, read back, and held against it. So whatever a family has no key for is
found, keys that are added to a model later included.
"""

from collections.abc import Iterator, Mapping
from math import isclose
from typing import Any

from llmtrain.config.attention import effective_keys
from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import expert_ffn_size
from llmtrain.config.reading.rendering import shown
from llmtrain.interop.families.rotary import stretched_theta

TRAINING_ONLY = (
    "dropout",
    "attention_dropout",
    "head_dropout",
    "moe.capacity_factor",
    "moe.jitter",
    "moe.aux_loss_coeff",
    "moe.z_loss_coeff",
)
"""Keys without an effect on what a trained model computes."""


def effective_values(model: ModelConfig) -> dict[str, Any]:
    """Dotted keys and values of everything that a trained model's results rest on, sizes that follow written out."""
    found = dict(_flattened(model.model_dump(exclude={"init", "attention", "rope_scaling", "moe"})))
    found |= {"num_kv_heads": model.kv_heads, "head_dim": model.head_size, "ffn_hidden_size": model.ffn_size}
    found["head_dropout"] = model.label_dropout if model.predicts_labels else None
    if model.predicts_labels:
        found.pop("tie_embeddings")  # of a head that there is none of
        found["num_labels"] = model.num_classes
    found["num_encoder_layers"] = model.encoder_layers if model.family == "encoder_decoder" else None
    if model.position != "rope":
        found.pop("rope_theta")
    if model.position != "t5_relative":
        found.pop("relative_buckets")
        found.pop("relative_max_distance")
    if model.activation not in ("gelu", "geglu"):
        found.pop("gelu_approximate")
    if not model.has_plain_mlp:
        found.pop("ffn_hidden_size")
    attention = {key: getattr(model.attention, key) for key in effective_keys(model.attention)}
    attention["scale"] = model.attention.scale or model.head_size**-0.5
    found |= {f"attention.{key}": value for key, value in attention.items()}
    return found | dict(_rope(model)) | dict(_moe(model))


def _rope(model: ModelConfig) -> Iterator[tuple[str, Any]]:
    if model.position != "rope":
        return
    yield "rope_theta", stretched_theta(model)
    scaling = model.rope_scaling
    if scaling is None or scaling.kind == "ntk":  # a larger theta, which says it all
        yield "rope_scaling.kind", None
        return
    yield from ((f"rope_scaling.{key}", getattr(scaling, key)) for key in effective_keys(scaling))


def _moe(model: ModelConfig) -> Iterator[tuple[str, Any]]:
    yield "moe", None if model.moe is None else "experts"
    if model.moe is None:
        return
    values = model.moe.model_dump() | {"ffn_hidden_size": expert_ffn_size(model), "top_k": model.moe.choices}
    if model.moe.router != "top_k":
        values.pop("normalize_weights")
    if model.moe.router == "switch":
        values.pop("top_k")
    yield from ((f"moe.{key}", value) for key, value in values.items())


def _flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(model: ModelConfig, expressed: ModelConfig, title: str) -> tuple[list[str], list[str]]:
    """(reasons against a family named `title`, differences that matter in training alone)."""
    ours, theirs = effective_values(model), effective_values(expressed)
    against, only_training = [], []
    # A key without an effect on one side rests on another one, which is told.
    for key in sorted(ours.keys() & theirs.keys(), key=lambda key: (key.count("."), key)):
        one, other = ours[key], theirs[key]
        rounded = isinstance(one, float) and isinstance(other, float) and isclose(one, other, rel_tol=1e-6)
        if one != other and not rounded:
            text = f"model.{key} = {shown(key, one)}, {title} has {shown(key, other)}"
            (only_training if key in TRAINING_ONLY else against).append(text)
    return against, only_training
