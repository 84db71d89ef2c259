"""Which parameters decay."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def parameter_groups(parameters: Iterable[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups: matrices and embeddings decay towards zero; biases and norm weights, all vectors, do not."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]  # frozen, there may be none of one kind
