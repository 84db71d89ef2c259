"""Position information: rotary angles and sinusoids. Nothing here is trained or saved.

Shape suffixes: S sequence, B micro-batch, N heads, D size of one head, H hidden.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from llmtrain.config.model import ModelConfig, RopeScaling


@dataclass(frozen=True)
class Rotary:
    """Cosine and sine of each position's angles, shaped [S, B, 1, D/2] to fit q_SBND."""

    cos: Tensor
    sin: Tensor


def rotary_angles(config: ModelConfig, positions_BS: Tensor, dtype: torch.dtype) -> Rotary:
    """Angles position * theta^(-2i/D) (Su et al. 2021, section 3.2.2), computed in fp32."""
    pairs = torch.arange(0, config.head_size, 2, device=positions_BS.device, dtype=torch.float32)
    frequencies = config.rope_theta ** (-pairs / config.head_size)
    if config.rope_scaling is not None:
        frequencies = stretched_frequencies(frequencies, config.rope_scaling)
    angles = positions_BS.T[:, :, None, None].float() * frequencies
    return Rotary(angles.cos().to(dtype), angles.sin().to(dtype))


def stretched_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's rule: low frequencies are divided by the factor, high ones kept, those between interpolated."""
    wavelengths = 2 * math.pi / frequencies
    rotations = scaling.original_max_seq_len / wavelengths
    kept = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


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
