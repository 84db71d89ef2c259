"""The types of weights and activations, and the scale of gradients, the same in all engines."""

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The types of weights and activations by the name of a precision."""


def clip_factor(grad_clip: float, grad_norm: float) -> float:
    """What gradients of that norm are multiplied with, so that their norm is at most `grad_clip` (0: any)."""
    return min(1.0, grad_clip / (grad_norm + 1e-6)) if grad_clip else 1.0


def scale_gradients(grads: list[Tensor], factor: float) -> None:
    """Multiply all of them, in place. A rank may have none: that of a pipeline stage without experts, say."""
    if grads and factor != 1.0:
        # The only multiplication of many tensors at once that there is, and it refuses an empty list.
        torch._foreach_mul_(grads, factor)  # pyright: ignore[reportPrivateImportUsage]
