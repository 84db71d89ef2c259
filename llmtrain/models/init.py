"""Initial weights as a function of (seed, global name, global index) alone.

A tensor is drawn in blocks of 65,536 consecutive elements of its global, flattened self, each block from a
counter-based generator (Philox) of its own. Whoever holds a part draws the blocks that the part touches, whole,
and cuts: the weights are the same bits in every layout.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmtrain.config.model import ModelConfig
from llmtrain.config.parameter_shapes import VOCABULARY_TENSORS
from llmtrain.parallel.stateless_random import derived_key

BLOCK_ELEMENTS = 65536

RESIDUAL_PROJECTIONS = ("attention.out.weight", "mlp.down.weight", "experts.down", "shared.down.weight")
"""Weights whose output is added to the residual stream: their deviation shrinks with depth (Radford et al. 2019)."""

ZEROS = (".bias", ".sinks")
EMBEDDINGS = ("embeddings.", "head.")


@dataclass(frozen=True)
class Distribution:
    """How a tensor is drawn: a constant, a normal, or a uniform with the given standard deviation."""

    kind: str
    std: float = 0.0
    value: float = 0.0
    rows: int | None = None
    """Rows from this one on are zero: they pad the vocabulary."""


def distribution(name: str, shape: tuple[int, ...], config: ModelConfig) -> Distribution:
    """The rule for a parameter, from its name and its global shape."""
    if name.endswith(ZEROS):
        return Distribution("constant", value=0.0)
    if "norm" in name.split(".")[-2]:
        return Distribution("constant", value=1.0)
    rows = config.vocabulary if name in VOCABULARY_TENSORS else None
    if config.init.scheme == "t5":
        return Distribution("normal", t5_std(name, shape, config), rows=rows)
    if name.startswith(EMBEDDINGS) or name.endswith("position_bias.weight"):
        std = small_std(config) if config.init.scheme == "small_normal" else config.init.std
        return Distribution("normal", std, rows=rows)
    kind, std = linear_distribution(shape[-2:], config)
    if config.init.depth_scaled and name.endswith(RESIDUAL_PROJECTIONS):
        std /= math.sqrt(2 * config.num_layers)
    return Distribution(kind, std)


def small_std(config: ModelConfig) -> float:
    return math.sqrt(2 / (5 * config.hidden_size))


def t5_std(name: str, shape: tuple[int, ...], config: ModelConfig) -> float:
    """T5's deviations: its scores are not scaled, so its queries start small (Raffel et al. 2020; mesh-tensorflow)."""
    if name.startswith("embeddings."):
        return config.init.std
    if name.endswith("position_bias.weight"):
        return config.hidden_size**-0.5
    if name.endswith("attention.q.weight"):
        return (config.hidden_size * config.head_size) ** -0.5
    return shape[-1] ** -0.5


def linear_distribution(shape: tuple[int, ...], config: ModelConfig) -> tuple[str, float]:
    """Kind and standard deviation for a matrix [out, in] under the configured scheme."""
    match config.init.scheme:
        case "small_normal":
            return "normal", small_std(config)
        case "xavier_normal":
            return "normal", math.sqrt(2 / sum(shape))
        case "xavier_uniform":
            return "uniform", math.sqrt(2 / sum(shape))
        case _:
            return "normal", config.init.std


def drawn_block(name: str, block: int, seed: int, rule: Distribution) -> np.ndarray:
    """Block number `block` of a tensor, always whole: [65536] fp32."""
    key = derived_key(seed, "initialization", name) & (2**64 - 1)
    generator = np.random.Generator(np.random.Philox(key=[key, block]))
    if rule.kind == "normal":
        values = generator.standard_normal(BLOCK_ELEMENTS, dtype=np.float32)
        return values * np.float32(rule.std)
    return (generator.random(BLOCK_ELEMENTS, dtype=np.float32) * 2 - 1) * np.float32(rule.std * math.sqrt(3))


def initial_tensor(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Tensor:
    """The whole initial tensor in fp32 on the CPU; `shape` is global."""
    rule = distribution(name, shape, config)
    if rule.kind == "constant":
        return torch.full(shape, rule.value)
    size = math.prod(shape)
    values = np.empty(size, dtype=np.float32)
    for start in range(0, size, BLOCK_ELEMENTS):
        block = drawn_block(name, start // BLOCK_ELEMENTS, seed, rule)
        values[start : start + BLOCK_ELEMENTS] = block[: size - start]
    tensor = torch.from_numpy(values).view(shape)
    if rule.rows is not None:
        tensor[rule.rows :] = 0
    return tensor
