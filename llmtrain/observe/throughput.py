"""How much arithmetic a token costs, and which share of a device's peak a run reaches."""

from math import prod

from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import parameter_shapes
from llmtrain.config.sequence_lengths import Lengths

_TERA = 1e12

PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("H100", 989 * _TERA),
    ("H200", 989 * _TERA),
    ("A100", 312 * _TERA),
    ("V100", 125 * _TERA),
)
"""Dense bf16 peak by a part of the device's name (V100: fp16), SXM boards, from the makers' data sheets."""

_SLOWER_BOARDS = ("H100 PCIe", "H100 NVL", "H200 NVL")
"""Boards with a lower peak than the table's: none is reported for them rather than a wrong one."""


def flops_per_sample(config: ModelConfig, lengths: Lengths) -> float:
    """Floating-point operations to train on one sample, forward and backward, in the "full" convention.

    Per position 6 x (parameters in matrix products) + 12 x num_heads x head_dim x keys in each layer: attention is not
    halved for causality, nor reduced for sparse kinds; the input embedding is left out, recomputation is not counted
    (Chowdhery et al. 2022, appendix B). Of experts, those count that a token goes to. Raises ValueError while the
    vocabulary size is not known.
    """
    both = config.family == "encoder_decoder"
    encoder, main = (lengths.encoder if both else lengths.main), lengths.main
    products = main * config.hidden_size * config.vocabulary
    for name, shape in parameter_shapes(config).items():
        if len(shape) < 2 or name.startswith(NO_PRODUCTS) or name.endswith(".position_bias.weight"):
            continue
        of_memory = ".cross_attention.k." in name or ".cross_attention.v." in name
        positions = encoder if name.startswith("encoder.") or of_memory else main
        products += positions * prod(shape) * _active_share(config, name)
    scores = config.encoder_layers * encoder**2 + config.decoder_layers * main * (main + (encoder if both else 0))
    return 6.0 * products + 12.0 * config.num_heads * config.head_size * scores


NO_PRODUCTS = ("embeddings.", "head.")
"""The head is counted as one whether it is tied or not."""


def _active_share(config: ModelConfig, name: str) -> float:
    """The share of a tensor that one token meets."""
    if config.moe is None or ".moe.experts." not in name:
        return 1.0
    return config.moe.choices / config.moe.num_experts


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 operations per second that a device can do at best; None where it is not known, as on a CPU."""
    if any(board in device_name for board in _SLOWER_BOARDS):
        return None
    return next((flops for part, flops in PEAK_FLOPS if part in device_name), None)


def mfu(tokens_per_second: float, flops_per_token: float, peak: float) -> float:
    """Model FLOP utilization, 0 to 1: `peak` is that of all devices together, in operations per second."""
    return tokens_per_second * flops_per_token / peak
