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
from llmtrain.config.parameters import Parameter, declare_parameters
from llmtrain.values.fragment import Box
from llmtrain.values.keyed_hash import derived_key

BLOCK_ELEMENTS = 65536


@dataclass(frozen=True)
class Distribution:
    """The distribution of a tensor: a constant, a normal, or a uniform with the given standard deviation."""

    kind: str
    std: float = 0.0
    value: float = 0.0
    rows: int | None = None
    """Rows from this one on are zero: they pad the vocabulary."""


def distribution(parameter: Parameter, config: ModelConfig) -> Distribution:
    """The rule for a parameter: by how it is declared to be drawn, and the scheme of the configuration."""
    if parameter.draw in ("zeros", "ones"):
        return Distribution("constant", value=float(parameter.draw == "ones"))
    rows = config.vocabulary if parameter.vocabulary else None
    if config.init.scheme == "t5":
        return Distribution("normal", t5_std(parameter, config), rows=rows)
    if parameter.draw in ("embedding", "head", "position_bias"):
        std = small_std(config) if config.init.scheme == "small_normal" else config.init.std
        return Distribution("normal", std, rows=rows)
    match config.init.scheme:
        case "small_normal":
            kind, std = "normal", small_std(config)
        case "xavier_normal":
            kind, std = "normal", math.sqrt(2 / sum(parameter.shape[-2:]))
        case "xavier_uniform":
            kind, std = "uniform", math.sqrt(2 / sum(parameter.shape[-2:]))
        case _:
            kind, std = "normal", config.init.std
    if config.init.depth_scaled and parameter.draw == "residual":  # deviations shrink with depth (Radford et al. 2019)
        std /= math.sqrt(2 * config.num_layers)
    return Distribution(kind, std)


def small_std(config: ModelConfig) -> float:
    return math.sqrt(2 / (5 * config.hidden_size))


def t5_std(parameter: Parameter, config: ModelConfig) -> float:
    """T5's deviations: its scores are not scaled, so its queries start small (Raffel et al. 2020; mesh-tensorflow)."""
    if parameter.draw == "embedding":
        return config.init.std
    if parameter.draw == "position_bias":
        return config.hidden_size**-0.5
    if parameter.draw == "query":
        return (config.hidden_size * config.head_size) ** -0.5
    return parameter.shape[-1] ** -0.5


def drawn_block(name: str, block: int, seed: int, rule: Distribution) -> np.ndarray:
    """Block number `block` of a tensor, always whole: [65536] fp32."""
    key = derived_key(seed, "initialization", name) & (2**64 - 1)
    # numpy's Philox, not torch's: its stream does not depend on the device.
    generator = np.random.Generator(np.random.Philox(key=[key, block]))
    if rule.kind == "normal":
        values = generator.standard_normal(BLOCK_ELEMENTS, dtype=np.float32)
        return values * np.float32(rule.std)
    return (generator.random(BLOCK_ELEMENTS, dtype=np.float32) * 2 - 1) * np.float32(rule.std * math.sqrt(3))


def initial_tensor(parameter: Parameter, config: ModelConfig, seed: int) -> Tensor:
    """The whole initial tensor in fp32 on the CPU."""
    rule, shape = distribution(parameter, config), parameter.shape
    if rule.kind == "constant":
        return torch.full(shape, rule.value)
    size = math.prod(shape)
    values = np.empty(size, dtype=np.float32)
    for start in range(0, size, BLOCK_ELEMENTS):
        block = drawn_block(parameter.name, start // BLOCK_ELEMENTS, seed, rule)
        values[start : start + BLOCK_ELEMENTS] = block[: size - start]
    tensor = torch.from_numpy(values).view(shape)
    if rule.rows is not None:
        tensor[rule.rows :] = 0
    return tensor


class InitialWeights:
    """The weights before the first step, as a source: each element a function of seed, name and global index."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self._config = config
        self._seed = seed
        self._declared = declare_parameters(config)
        self._last: tuple[str, Tensor] | None = None

    def read(self, name: str, kind: str, box: Box) -> Tensor:
        declared = self._declared[name]
        if self._last is None or self._last[0] != name:  # boxes of one tensor are asked for one after the other
            self._last = name, initial_tensor(declared, self._config, self._seed)
        return self._last[1][box.slices_in(Box.whole(declared.shape))]

    def global_shape(self, name: str, kind: str) -> tuple[int, ...] | None:
        return self._declared[name].shape
