"""A GGUF file as a source of weights: its keys as a model of ours, checked against its tensors before one is read."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from llmtrain.config.attention import RopeScaling
from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import parameter_shapes
from llmtrain.errors import ConfigError, DataError
from llmtrain.interop.gguf.architectures import (
    ARCHITECTURES,
    ROPE_FACTORS,
    ROPE_RULE,
    Architecture,
    rope_factors,
    rope_scaling_of,
)
from llmtrain.interop.gguf.reading import GgufHeader, read_header
from llmtrain.interop.name_table import Pairing, pairings, their_shape, to_ours
from llmtrain.values.fragment import Box

_LLAMA3 = RopeScaling(low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192)
"""The published rule: a file has the factors that come of one, and not the rule."""

_MAX_SHOWN = 10
_NUMBERS = {
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.dimension_count",
    "rope.freq_base", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.attn_factor",
    "expert_count", "expert_used_count", "vocab_size",
}  # fmt: skip
_IGNORED = {"rope.scaling.finetuned", "tensor_data_layout"}
"""Keys that change nothing that is computed."""


@dataclass(frozen=True)
class GgufFile:
    """A file whose keys fit its tensors; a source of weights like a checkpoint. `notes` tell what of it is not taken
    over."""

    header: GgufHeader
    architecture: Architecture
    model: ModelConfig
    notes: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"GGUF {self.architecture.name}"

    def iter_tensors(self) -> Iterator[tuple[str, int | None, Tensor]]:
        """Every parameter in fp32, one of the file's tensors at a time; the expert is None: stacked ones lie whole."""
        for pairing in pairings(self.architecture.table, self.model):
            for name, tensor in zip(pairing.ours, self._ours(pairing), strict=True):
                yield name, None, tensor

    @cached_property
    def _by_name(self) -> dict[str, Pairing]:
        return {name: found for found in pairings(self.architecture.table, self.model) for name in found.ours}

    def tensor(self, name: str, expert: int | None = None) -> Tensor:
        """The whole tensor of a global name, in fp32, or that of one expert."""
        found = self._by_name[name]
        whole = self._ours(found)[found.ours.index(name)]
        return whole if expert is None else whole[expert]

    def read(self, name: str, kind: str, box: Box) -> Tensor:
        """A box of a parameter, as a checkpoint gives it."""
        assert kind == "master", "a GGUF file holds weights only"
        inside = tuple(slice(begin, begin + size) for begin, size in zip(box.offsets, box.shape, strict=True))
        return self.tensor(name)[inside].contiguous()

    def global_shape(self, name: str, kind: str) -> tuple[int, ...] | None:
        """Shape of a parameter, None for what is no weight of this model."""
        return parameter_shapes(self.model).get(name) if kind == "master" else None

    def _ours(self, pairing: Pairing) -> list[Tensor]:
        return to_ours(pairing, self.header.tensor(pairing.theirs), self.model)


def open_gguf(path: Path) -> GgufFile:
    """Read the header of a file. Raises ConfigError for architectures, types and keys that llmtrain does not know, or
    values that are none; DataError where it is damaged, or holds other tensors than its keys ask for."""
    header = read_header(path)
    name = header.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ConfigError(f"{path}: general.architecture = {str(name)[:60]}: can import {', '.join(ARCHITECTURES)}.")
    if header.metadata.get("split.count", 1) not in (0, 1):
        raise ConfigError(f"{path}: is one of several parts (split.count). Join them first: llama-gguf-split --merge.")
    architecture = ARCHITECTURES[name]
    keys = {key.removeprefix(f"{name}."): value for key, value in header.metadata.items() if key.startswith(f"{name}.")}
    _require_keys(path, architecture, keys)
    model = _model(header, architecture, keys)
    expected = {pairing.theirs: their_shape(pairing, model) for pairing in pairings(architecture.table, model)}
    _require_fit(header, expected)
    dropped = [] if model.moe is None else ["model.moe.aux_loss_coeff and jitter are the defaults: a file has none"]
    return GgufFile(header, architecture, model, dropped)


def _require_keys(path: Path, architecture: Architecture, keys: Mapping[str, Any]) -> None:
    """Raise ConfigError for keys that are missing, of another kind, or unknown, for those may change the results."""
    whole = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")
    problems = [f"{key} is missing" for key in (*whole, architecture.norm_key) if key not in keys]
    numbers = {*whole, architecture.norm_key} | (_NUMBERS if architecture.norm_key.endswith("rms_epsilon") else set())
    for key, value in keys.items():
        if key in numbers:
            is_number = type(value) is int or (type(value) is float and key not in whole)
            if not is_number or value < 0:
                problems.append(f"{key} = {str(value)[:60]}: must be a number, not negative, the same for every layer")
        elif key not in _IGNORED | {"rope.scaling.type"}:
            problems.append(f"{key} = {str(value)[:60]}: llmtrain does not know what it changes")
    if problems:
        raise ConfigError(f"{path}: cannot be imported: {'; '.join(problems[:_MAX_SHOWN])}.")


def _model(header: GgufHeader, architecture: Architecture, keys: Mapping[str, Any]) -> ModelConfig:
    path, tensors = header.path, header.tensors
    if keys["block_count"] > len(tensors):  # before anything is made for each
        raise DataError(f"{path}: block_count = {keys['block_count']:,}, and the file has {len(tensors):,} tensors.")
    if (embedding := tensors.get("token_embd.weight")) is None:
        raise DataError(f"{path}: has no token_embd.weight: a file of a vocabulary alone, or a damaged one.")
    fields: dict[str, Any] = {
        "num_layers": keys["block_count"],
        "max_seq_len": keys["context_length"],
        "hidden_size": keys["embedding_length"],
        "ffn_hidden_size": keys["feed_forward_length"],
        "num_heads": keys["attention.head_count"],
        "norm_eps": keys[architecture.norm_key],
        "vocab_size": embedding.shape[0],
        "tie_embeddings": "output.weight" not in tensors,
        "bias": "blk.0.attn_q.bias" in tensors,
        **architecture.fields,
    }
    if architecture.fields["position"] == "rope":
        fields |= _rotary_fields(header, keys)
    try:
        return ModelConfig(**fields)
    except ValidationError as error:
        faults = (
            f"{'.'.join(map(str, fault['loc']))} = {repr(fault['input'])[:60]}: {fault['msg']}"
            for fault in error.errors()
        )
        raise ConfigError(f"{path}: cannot be imported: {'; '.join(faults)}.") from None


def _rotary_fields(header: GgufHeader, keys: Mapping[str, Any]) -> dict[str, Any]:
    heads = keys["attention.head_count"] or 1
    size = keys.get("attention.key_length", keys["embedding_length"] // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.get(key, size) != size:
            raise ConfigError(f"{header.path}: {key} = {keys[key]}, and heads have {size}: llmtrain has one size.")
    fields: dict[str, Any] = {
        "num_kv_heads": keys.get("attention.head_count_kv", heads),
        "head_dim": size,
        "rope_theta": keys.get("rope.freq_base", 10000.0),
    }
    if keys.get("expert_count", 0):
        moe = {"router": "top_k", "normalize_weights": True, "num_experts": keys["expert_count"]}
        fields["moe"] = moe | {"top_k": keys.get("expert_used_count")}
    try:
        fields["rope_scaling"] = rope_scaling_of(keys)
    except (ConfigError, ValidationError) as error:
        raise ConfigError(f"{header.path}: {str(error)[:300]}.") from None
    if ROPE_FACTORS in header.tensors:
        if fields["rope_scaling"] is not None:
            raise ConfigError(f"{header.path}: has {ROPE_FACTORS} and rope.scaling.type: llmtrain has one of them.")
        fields["rope_scaling"] = _llama3_rule(header, size, fields["rope_theta"])
    return fields


def _llama3_rule(header: GgufHeader, size: int, theta: float) -> RopeScaling:
    """The rule whose factors a file has. Raises ConfigError where it is none that is known."""
    info = header.tensors[ROPE_FACTORS]
    if info.shape != (size // 2,):
        raise DataError(f"{header.path}: {ROPE_FACTORS} has the shape {list(info.shape)}, not [{size // 2}].")
    found = header.tensor(ROPE_FACTORS)
    rules, said = [_LLAMA3.with_keys({"factor": max(1.0, float(found.max()))})], header.metadata.get(ROPE_RULE)
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len")
    if isinstance(said, list) and len(said) == len(names):
        with suppress(ValidationError):  # then it must be another one
            rules.append(RopeScaling.model_validate(dict(zip(names, said, strict=True))))
    for scaling in rules:
        if theta > 1 and torch.allclose(rope_factors(scaling, size, theta), found, rtol=1e-5, atol=0):
            return scaling
    raise ConfigError(f"{header.path}: {ROPE_FACTORS} stretches positions by no rule that llmtrain knows.")


def _require_fit(header: GgufHeader, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise DataError where keys and tensors are of different models."""
    known = {*expected, ROPE_FACTORS}
    problems = [f"{name[:80]}: the keys do not ask for it" for name in header.tensors if name not in known]
    for name, shape in expected.items():
        if name not in header.tensors:
            problems.append(f"{name}: is missing")
        elif header.tensors[name].shape != shape:
            problems.append(f"{name}: has the shape {list(header.tensors[name].shape)}, the keys ask for {list(shape)}")
    if problems:
        listed = "\n  ".join(problems[:_MAX_SHOWN])
        raise DataError(f"{header.path}: keys and tensors do not fit ({len(problems)} problems):\n  {listed}")
