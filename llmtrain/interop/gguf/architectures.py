"""llama.cpp's architectures that compute what models of ours do: names of tensors, and a model's keys both ways.

llama's rotary positions turn the pairs (x[2i], x[2i + 1]) of a head, so rows of its queries and keys lie in that order;
qwen3's turn (x[i], x[i + D/2]), as ours do.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import log, pi
from typing import Any

import torch
from torch import Tensor

from llmtrain.config.attention import RopeScaling
from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import expert_ffn_size
from llmtrain.errors import ConfigError
from llmtrain.interop.families.rotary import stretched_theta
from llmtrain.interop.gguf.file_format import Value
from llmtrain.interop.name_table import Row, Shape, Table

_LAYER = "decoder.layers.{n}."
_ENDS: Table = (
    Row("embeddings.word", "token_embd", Shape.VOCABULARY),
    Row("decoder.final_norm", "output_norm"),
    Row("head", "output", Shape.VOCABULARY),
)
_BLOCK: Table = (
    Row(_LAYER + "attention_norm", "blk.{n}.attn_norm"),
    Row(_LAYER + "attention.out", "blk.{n}.attn_output"),
    Row(_LAYER + "mlp_norm", "blk.{n}.ffn_norm"),
    Row(_LAYER + "mlp.gate", "blk.{n}.ffn_gate"),
    Row(_LAYER + "mlp.up", "blk.{n}.ffn_up"),
    Row(_LAYER + "mlp.down", "blk.{n}.ffn_down"),
)
_LLAMA: Table = (
    *_ENDS,
    Row(_LAYER + "attention.q", "blk.{n}.attn_q", Shape.INTERLEAVED),
    Row(_LAYER + "attention.k", "blk.{n}.attn_k", Shape.INTERLEAVED),
    Row(_LAYER + "attention.v", "blk.{n}.attn_v"),
    *_BLOCK,
    Row(_LAYER + "moe.router", "blk.{n}.ffn_gate_inp"),
    Row(_LAYER + "moe.experts.gate", "blk.{n}.ffn_gate_exps.weight", Shape.STACKED),
    Row(_LAYER + "moe.experts.up", "blk.{n}.ffn_up_exps.weight", Shape.STACKED),
    Row(_LAYER + "moe.experts.down", "blk.{n}.ffn_down_exps.weight", Shape.STACKED),
)
_QWEN3: Table = (
    *_ENDS,
    Row(_LAYER + "attention.q", "blk.{n}.attn_q"),
    Row(_LAYER + "attention.k", "blk.{n}.attn_k"),
    Row(_LAYER + "attention.v", "blk.{n}.attn_v"),
    Row(_LAYER + "attention.q_norm", "blk.{n}.attn_q_norm"),
    Row(_LAYER + "attention.k_norm", "blk.{n}.attn_k_norm"),
    *_BLOCK,
)
_GPT2: Table = (
    *_ENDS,
    Row("embeddings.position", "position_embd"),
    Row((_LAYER + "attention.q", _LAYER + "attention.k", _LAYER + "attention.v"), "blk.{n}.attn_qkv", Shape.JOINED),
    *_BLOCK,
)

ROPE_FACTORS = "rope_freqs.weight"
"""What llama3 divides each frequency by, [D / 2] in fp32; it has no key."""

ROPE_RULE = "llmtrain.rope_scaling"
"""Our key for the rule that the factors came of: factor, low and high frequency factor, and the original length."""

KEPT_WHOLE = ("position_embd.weight", ".ffn_gate_inp.weight")
"""Ends of the names of matrices that stay in fp32 in every file, as llama.cpp's converter has it."""

Fields = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's: its tensors and the keys behind its name."""

    name: str
    table: Table
    norm_key: str
    limits: Callable[[ModelConfig], list[str]]
    """Reasons against a model of one of its families, in which llama.cpp computes something else."""
    more_keys: Callable[[ModelConfig], dict[str, Value]]
    """Keys beside those that all have."""
    fields: Fields
    """What every model of it has, by our keys."""

    def keys_of(self, model: ModelConfig) -> dict[str, Value]:
        """The file's keys of a model."""
        keys: dict[str, Value] = {
            "block_count": model.num_layers,
            "context_length": context_length(model),
            "embedding_length": model.hidden_size,
            "feed_forward_length": model.ffn_size if model.moe is None else expert_ffn_size(model),
            "attention.head_count": model.num_heads,
            self.norm_key: float(model.norm_eps),
            **self.more_keys(model),
        }
        return {f"{self.name}.{key}": value for key, value in keys.items()}


def context_length(model: ModelConfig) -> int:
    """The longest text that llama.cpp computes as we do. It has no window for these architectures: up to its size a
    window hides nothing; learned positions have as many rows as this says."""
    window = model.attention.window if model.attention.kind == "sliding_window" else None
    return model.max_seq_len if window is None else min(window, model.max_seq_len)


def _rotary_keys(model: ModelConfig) -> dict[str, Value]:
    keys: dict[str, Value] = {
        "vocab_size": model.vocabulary,
        "attention.head_count_kv": model.kv_heads,
        "attention.key_length": model.head_size,
        "attention.value_length": model.head_size,
        "rope.dimension_count": model.head_size,
        "rope.freq_base": float(stretched_theta(model)),
    }
    if model.moe is not None:
        keys |= {"expert_count": model.moe.num_experts, "expert_used_count": model.moe.choices}
    scaling = model.rope_scaling
    if scaling is None or scaling.kind not in ("linear", "yarn"):
        return keys
    keys |= {"rope.scaling.type": scaling.kind, "rope.scaling.factor": float(scaling.factor)}
    if scaling.kind == "yarn":
        keys["rope.scaling.original_context_length"] = scaling.original_max_seq_len
        if scaling.attention_factor is not None:
            # llama.cpp multiplies with the usual factor whatever the file says.
            keys["rope.scaling.attn_factor"] = float(scaling.attention_factor / _usual_attention_factor(scaling.factor))
    return keys


def _usual_attention_factor(factor: float) -> float:
    return 0.1 * log(factor) + 1


def _rotary_limits(model: ModelConfig) -> list[str]:
    scaling, reasons = model.rope_scaling, list[str]()
    if scaling is not None and scaling.kind == "yarn" and (scaling.beta_fast, scaling.beta_slow) != (32, 1):
        found = f"{scaling.beta_fast:g} and {scaling.beta_slow:g}"
        reasons.append(f"model.rope_scaling.beta_fast and beta_slow = {found}: llama.cpp has 32 and 1")
    if model.head_size % 2:
        reasons.append(f"model.head_dim = {model.head_size} is odd: llama.cpp turns pairs")
    return reasons


def _qwen3_limits(model: ModelConfig) -> list[str]:
    scaling = model.rope_scaling
    has_factors = scaling is not None and scaling.kind == "llama3"
    told = ["model.rope_scaling.kind = llama3: llama.cpp's qwen3 has no factors of frequencies"] if has_factors else []
    return [*told, *_rotary_limits(model)]


def _gpt2_limits(model: ModelConfig) -> list[str]:
    activation = f"{model.activation} with gelu_approximate = {model.gelu_approximate}"
    has_gelu = model.activation == "gelu" and model.gelu_approximate == "tanh"
    return [] if has_gelu else [f"model.activation = {activation}: llama.cpp's gpt2 has gelu with tanh"]


_ROTARY: Fields = {"position": "rope", "norm": "rmsnorm", "activation": "swiglu"}
_PLAIN: Fields = {"position": "learned", "norm": "layernorm", "activation": "gelu", "gelu_approximate": "tanh"}
_RMS, _LAYER_NORM = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"

ARCHITECTURES = {
    "llama": Architecture("llama", _LLAMA, _RMS, _rotary_limits, _rotary_keys, _ROTARY),
    "qwen3": Architecture("qwen3", _QWEN3, _RMS, _qwen3_limits, _rotary_keys, {**_ROTARY, "qk_norm": True}),
    "gpt2": Architecture("gpt2", _GPT2, _LAYER_NORM, _gpt2_limits, lambda model: {}, {**_PLAIN, "bias": True}),
}
"""By the value of `general.architecture`."""

OF_FAMILY = {"llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen3": "qwen3", "gpt2": "gpt2"}
"""The architecture that a family of Hugging Face's has in llama.cpp, as its converter gives it."""


def architecture_for(model: ModelConfig, family: str, title: str) -> Architecture:
    """The architecture of a model that a family expresses. Raises ConfigError where llama.cpp computes something else,
    or nothing."""
    if family not in OF_FAMILY or model.predicts_labels:
        what = f"model.head = {model.head}" if model.predicts_labels else f"This is a {title} model"
        raise ConfigError(f"--to gguf: {what}: written are decoders with a head for tokens: {', '.join(OF_FAMILY)}.")
    architecture = ARCHITECTURES[OF_FAMILY[family]]
    if reasons := architecture.limits(model):
        raise ConfigError(f"--to gguf: llama.cpp would compute something else: {'; '.join(reasons)}. Try --to hf.")
    return architecture


def rope_factors(scaling: RopeScaling, size: int, theta: float) -> Tensor:
    """[D / 2] in fp32: what llama3 divides each frequency by (see llama3_kept in models/positions.py)."""
    frequencies = theta ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    turns = scaling.original_max_seq_len * frequencies / (2 * pi)
    band = scaling.high_freq_factor - scaling.low_freq_factor
    kept = ((turns - scaling.low_freq_factor) / band).clamp(0, 1)
    return 1 / ((1 - kept) / scaling.factor + kept)


def rope_scaling_of(keys: Mapping[str, Any]) -> RopeScaling | None:
    """The stretching that a file's keys name, for a file without factors. Raises ConfigError for kinds that are not
    known."""
    kind, factor = keys.get("rope.scaling.type", "none"), float(keys.get("rope.scaling.factor", 1.0))
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    if kind != "yarn":
        raise ConfigError(f"rope.scaling.type = {str(kind)[:60]}: can import none, linear and yarn")
    attention = keys.get("rope.scaling.attn_factor")
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_seq_len=keys.get("rope.scaling.original_context_length", keys["context_length"]),
        attention_factor=None if attention is None else float(attention) * _usual_attention_factor(factor),
    )
