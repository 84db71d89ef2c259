"""Initial weights as a function of (seed, global name, global index) alone.

A tensor is drawn in blocks of 65,536 consecutive elements of its global, flattened self, each block from a
counter-based generator (Philox) of its own. Whoever holds a part draws the blocks that the part touches, whole,
and cuts: the weights are the same bits in every layout.
"""

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmtrain.config.finetune import FinetuneConfig
from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import Parameter, declare_parameters
from llmtrain.values.fragment import Box
from llmtrain.values.keyed_hash import derived_key

BLOCK_ELEMENTS = 65536

STRIP_ELEMENTS = 64 * BLOCK_ELEMENTS
"""Elements of whole rows that are drawn at a time where only a part of each is kept: 16 MiB."""


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
    if parameter.draw == "lora":  # as a linear of torch begins: uniform within 1 / sqrt(in), as in the authors' code
        return Distribution("uniform", 1 / math.sqrt(3 * parameter.shape[-1]))
    rows = config.vocabulary if parameter.vocabulary else None
    if config.init.scheme == "t5":
        return Distribution("normal", t5_std(parameter, config), rows=rows)
    if parameter.draw in ("embedding", "head", "position_bias", "prompt"):
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


def draw_block(target: np.ndarray, key: int, block: int, rule: Distribution) -> None:
    """Fill [65536] fp32 with block number `block` of the tensor of this key."""
    # numpy's Philox, not torch's: its stream does not depend on the device.
    generator = np.random.Generator(np.random.Philox(key=[key, block]))
    # Both draw with the interpreter's lock released, so that threads draw at the same time.
    if rule.kind == "normal":
        generator.standard_normal(dtype=np.float32, out=target)
        target *= np.float32(rule.std)
    else:
        generator.random(dtype=np.float32, out=target)
        target *= 2
        target -= 1
        target *= np.float32(rule.std * math.sqrt(3))


def draw_range(target: np.ndarray, start: int, key: int, rule: Distribution) -> None:
    """Fill a flat array with the elements from `start` on. A block is drawn whole, and where it lies if it fits."""
    stop = start + len(target)

    def draw(block: int) -> None:
        first, last = block * BLOCK_ELEMENTS, (block + 1) * BLOCK_ELEMENTS
        if start <= first and last <= stop:
            draw_block(target[first - start : last - start], key, block, rule)
        else:
            drawn = np.empty(BLOCK_ELEMENTS, dtype=np.float32)
            draw_block(drawn, key, block, rule)
            begin, end = max(start, first), min(stop, last)
            target[begin - start : end - start] = drawn[begin - first : end - first]

    blocks = range(start // BLOCK_ELEMENTS, -(-stop // BLOCK_ELEMENTS))
    # A run may be told of any number of threads: more than there are cores would only cost memory here.
    threads = min(len(blocks), torch.get_num_threads(), os.cpu_count() or 1)
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(draw, blocks))
    else:
        for block in blocks:
            draw(block)


def row_runs(values: np.ndarray, box: Box, shape: tuple[int, ...]) -> Iterator[tuple[int, np.ndarray]]:
    """The rows of a box that follow each other in the whole tensor: the number of the first, and [rows, columns]."""
    *outer, rows = (1, *box.shape[:-1])
    *offsets, first = (0, *box.offsets[:-1])
    sizes = (1, *shape[:-1])
    for place in np.ndindex(*outer):
        number = 0
        for size, offset in zip(sizes, (*(o + p for o, p in zip(offsets, place, strict=True)), first), strict=True):
            number = number * size + offset
        yield number, values.reshape(*outer, rows, -1)[place]


def initial_tensor(parameter: Parameter, config: ModelConfig, seed: int, box: Box | None = None) -> Tensor:
    """The initial tensor, or a box of it, in fp32 on the CPU. Blocks that the box does not touch are not drawn."""
    rule, box = distribution(parameter, config), box or Box.whole(parameter.shape)
    if rule.kind == "constant":
        return torch.full(box.shape, rule.value)
    key = derived_key(seed, "initialization", parameter.name) & (2**64 - 1)
    values = np.empty(box.shape, dtype=np.float32)
    width = parameter.shape[-1]
    first, columns = box.offsets[-1], box.shape[-1]
    # A part of each row: many rows lie in one block, so they are drawn whole, so many at a time, and cut.
    most = max(1, STRIP_ELEMENTS // width) if columns < width else box.num_elements
    for row, rows in row_runs(values, box, parameter.shape):
        for begin in range(0, len(rows), most):
            part = rows[begin : begin + most]
            if columns == width or len(part) == 1:
                draw_range(part.reshape(-1), (row + begin) * width + first, key, rule)
            else:
                drawn = np.empty((len(part), width), dtype=np.float32)
                draw_range(drawn.reshape(-1), (row + begin) * width, key, rule)
                part[:] = drawn[:, first : first + columns]
    tensor = torch.from_numpy(values)
    if rule.rows is not None:
        tensor[max(0, rule.rows - box.offsets[0]) :] = 0
    return tensor


class InitialWeights:
    """The weights before the first step, as a source: each element a function of seed, name and global index."""

    def __init__(self, config: ModelConfig, seed: int, finetune: FinetuneConfig | None = None) -> None:
        self._config = config
        self._seed = seed
        self._declared = declare_parameters(config, finetune)

    def read(self, name: str, kind: str, box: Box) -> Tensor:
        return initial_tensor(self._declared[name], self._config, self._seed, box)

    def global_shape(self, name: str, kind: str) -> tuple[int, ...] | None:
        return self._declared[name].shape if kind == "master" and name in self._declared else None
