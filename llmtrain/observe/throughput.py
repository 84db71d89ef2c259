"""How much arithmetic a token costs, and which share of a device's peak a run reaches."""

from llmtrain.config.model import ModelConfig

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


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Floating-point operations to train on one token, forward and backward, in the "full" convention.

    6 x (parameters in matrix products) + 12 x num_layers x num_heads x head_dim x seq_len: attention is not halved for
    causality, the input embedding is left out, recomputation is not counted (Chowdhery et al. 2022, appendix B).
    Raises ValueError while the vocabulary size is not known.
    """
    heads_width = config.num_heads * config.head_size
    kv_width = config.kv_heads * config.head_size
    attention = config.hidden_size * (2 * heads_width + 2 * kv_width)
    mlp = (3 if config.gated else 2) * config.hidden_size * config.ffn_size
    head = config.hidden_size * config.vocabulary
    matmul_parameters = config.num_layers * (attention + mlp) + head
    return 6.0 * matmul_parameters + 12.0 * config.num_layers * heads_width * seq_len


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 operations per second that a device can do at best; None where it is not known, as on a CPU."""
    if any(board in device_name for board in _SLOWER_BOARDS):
        return None
    return next((flops for part, flops in PEAK_FLOPS if part in device_name), None)


def mfu(tokens_per_second: float, flops_per_token: float, peak: float) -> float:
    """Model FLOP utilization, 0 to 1: `peak` is that of all devices together, in operations per second."""
    return tokens_per_second * flops_per_token / peak
