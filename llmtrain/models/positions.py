"""Position information: rotary angles, sinusoids, and scores by distance.

Shape suffixes: S sequence or queries, T keys, B micro-batch, N heads, n some of them, D size of one head, H hidden.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from llmtrain.config.attention import RopeScaling
from llmtrain.config.model import ModelConfig


@dataclass(frozen=True)
class Rotary:
    """Cosine and sine of each position's angles, shaped [S, B, 1, D/2] to fit q_SBND."""

    cos: Tensor
    sin: Tensor


def sent(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device, without waiting for what the device has to do: from memory that is pinned.

    A compiled graph has it as a constant.
    """
    waits = device.type != "cuda" or torch.compiler.is_compiling()
    return x.to(device) if waits else x.pin_memory().to(device, non_blocking=True)


def rotary_angles(config: ModelConfig, positions_BS: Tensor, dtype: torch.dtype) -> Rotary:
    """Angles position * theta^(-2i/D) (Su et al. 2021, section 3.2.2), stretched as configured, computed in fp32."""
    frequencies = sent(rotary_frequencies(config), positions_BS.device)
    angles = positions_BS.T[:, :, None, None].float() * frequencies
    factor = 1.0 if config.rope_scaling is None else score_factor(config.rope_scaling)
    return Rotary((angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype))


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """[D/2]: radians per position of each pair, after stretching, in fp32."""
    size, base, scaling = config.head_size, config.rope_theta, config.rope_scaling
    if scaling is not None and scaling.kind == "ntk" and size > 2:
        # The slowest pair turns `factor` times slower, the fastest as before (the static form of "NTK-aware").
        base *= scaling.factor ** (size / (size - 2))
    # In the order of transformers, whose rounding imported models were trained with.
    frequencies = 1.0 / base ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    if scaling is None:
        return frequencies
    match scaling.kind:
        case "ntk":
            return frequencies
        case "linear":
            return frequencies / scaling.factor
        case "yarn":
            return blended(frequencies, yarn_kept(size, base, scaling), scaling.factor)
        case "llama3":
            return blended(frequencies, llama3_kept(frequencies, scaling), scaling.factor)


def blended(frequencies: Tensor, kept: Tensor, factor: float) -> Tensor:
    """Frequencies divided by the factor where `kept` is 0, as they were where it is 1."""
    return (1 - kept) * frequencies / factor + kept * frequencies


def llama3_kept(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's rule: by the number of turns in the original length, linear between the two bounds."""
    turns = scaling.original_max_seq_len / (2 * math.pi / frequencies)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return kept.clamp(0, 1)


def yarn_kept(size: int, base: float, scaling: RopeScaling) -> Tensor:
    """YaRN's ramp over the pairs between `beta_fast` and `beta_slow` turns (Peng et al. 2023, section 3.2).

    The bounds are rounded outwards to whole pairs, as in the authors' code and transformers.
    """

    def pair_with(turns: float) -> float:
        return size * math.log(scaling.original_max_seq_len / (turns * 2 * math.pi)) / (2 * math.log(base))

    first = max(math.floor(pair_with(scaling.beta_fast)), 0)
    last = min(math.ceil(pair_with(scaling.beta_slow)), size - 1)
    ramp = (torch.arange(size // 2, dtype=torch.float32) - first) / ((last - first) or 0.001)
    return 1 - ramp.clamp(0, 1)


def score_factor(scaling: RopeScaling) -> float:
    """The factor of cosines and sines: YaRN sharpens scores (Peng et al. 2023, section 3.4)."""
    if scaling.kind != "yarn":
        return 1.0
    return scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0


def rotate(x_SBND: Tensor, rotary: Rotary) -> Tensor:
    """Turn the pairs (x[i], x[i + D/2]) by their angles: the half-split pairing that Llama's weights expect."""
    first, second = x_SBND.chunk(2, dim=-1)
    return torch.cat(
        (first * rotary.cos - second * rotary.sin, second * rotary.cos + first * rotary.sin),
        dim=-1,
    )


def sinusoids(positions_BS: Tensor, hidden_size: int) -> Tensor:
    """[S, B, H]: sines at even and cosines at odd places (Vaswani et al. 2017, section 3.5), in fp32."""
    pairs = torch.arange(0, hidden_size, 2, device=positions_BS.device, dtype=torch.float32)
    angles = positions_BS.T[:, :, None].float() * 10000.0 ** (-pairs / hidden_size)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., :hidden_size]


def at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class PositionBias(Protocol):
    """Scores that are added for position. They depend on the distance t - s alone, not on where it lies."""

    def scores(self, q_positions_S: Tensor, k_positions_T: Tensor, first_head: int, num_heads: int) -> Tensor:
        """[n, S, T] in fp32 for the global heads first_head..first_head + num_heads - 1."""
        ...


def distances(q_positions_S: Tensor, k_positions_T: Tensor) -> Tensor:
    """[S, T]: how far behind the query the key lies; negative before it."""
    return k_positions_T[None, :] - q_positions_S[:, None]


@dataclass(frozen=True)
class Alibi:
    """-slope * |distance| (Press et al. 2022, section 3). Without an order it falls to both sides."""

    num_heads: int
    """Of the whole model: slopes belong to global heads."""

    def scores(self, q_positions_S: Tensor, k_positions_T: Tensor, first_head: int, num_heads: int) -> Tensor:
        slopes = torch.tensor(alibi_slopes(self.num_heads)[first_head : first_head + num_heads])
        away_ST = distances(q_positions_S, k_positions_T).abs().float()
        return -sent(slopes, away_ST.device)[:, None, None] * away_ST


def alibi_slopes(num_heads: int) -> list[float]:
    """2^(-8 i / num_heads) for i = 1..num_heads. Where that is no power of two, as in the authors' code, those of the
    next smaller power, then every other one of twice that power."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    return slopes + [2 ** (-8 * i / (2 * power)) for i in range(1, 2 * (num_heads - power), 2)]


class RelativeBias(nn.Module):
    """A learned score per head and class of distances (Raffel et al. 2020, section 2.1)."""

    def __init__(self, config: ModelConfig, bidirectional: bool) -> None:
        super().__init__()
        self.bidirectional = bidirectional
        self.max_distance = config.relative_max_distance
        self.first_head = 0
        """Global number of the head of the first column."""
        self.weight = nn.Parameter(torch.empty(config.relative_buckets, config.num_heads))

    def scores(self, q_positions_S: Tensor, k_positions_T: Tensor, first_head: int, num_heads: int) -> Tensor:
        away_ST = distances(q_positions_S, k_positions_T)
        buckets_ST = relative_buckets(away_ST, self.bidirectional, self.weight.shape[0], self.max_distance)
        start = first_head - self.first_head
        return at_least_fp32(self.weight[:, start : start + num_heads])[buckets_ST].movedim(-1, 0)


def relative_buckets(away: Tensor, bidirectional: bool, num_buckets: int, max_distance: int) -> Tensor:
    """The class of each distance, as T5 computes it: near ones each their own, far ones by logarithm, those from
    `max_distance` on together. Bidirectional, the upper half of the classes is for keys behind the query; else all of
    those fall into class 0."""
    first = torch.zeros_like(away)
    if bidirectional:
        num_buckets //= 2
        first = (away > 0).long() * num_buckets
        away = away.abs()
    else:
        away = (-away).clamp(min=0)
    num_exact = num_buckets // 2
    logs = torch.log(away.clamp(min=1).float() / num_exact) / math.log(max_distance / num_exact)
    far = (num_exact + (logs * (num_buckets - num_exact)).long()).clamp(max=num_buckets - 1)
    return first + torch.where(away < num_exact, away, far)


def build_position_bias(config: ModelConfig, causal: bool) -> Alibi | RelativeBias | None:
    """The scores by position of one stack's self-attention; None where the configuration has none."""
    match config.position:
        case "alibi":
            return Alibi(config.num_heads)
        case "t5_relative":
            return RelativeBias(config, bidirectional=not causal)
        case _:
            return None
