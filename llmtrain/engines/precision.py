"""The types of weights and activations, fp32 copies of weights, and the scale of gradients, in all engines."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from llmtrain.config.parameters import is_frozen

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


def freeze(parameters: Mapping[str, nn.Parameter], patterns: Iterable[str]) -> None:
    """Let those that a pattern of `optim.freeze` fits have no gradients: by that, engines know them."""
    for name, parameter in parameters.items():
        parameter.requires_grad_(not is_frozen(name, patterns))


def fp32_master(parameter: nn.Parameter) -> Tensor:
    """What an optimizer steps: the weight itself in fp32, else an fp32 copy that gathers its gradients in fp32.

    Each gradient is added to the copy's as soon as it is complete, and freed.
    """
    if parameter.dtype == torch.float32:
        return parameter
    master = parameter.detach().float()

    def accumulate(parameter: Tensor) -> None:
        if parameter.grad is not None:
            grad = parameter.grad.float()
            master.grad = grad if master.grad is None else master.grad.add_(grad)
            parameter.grad = None

    parameter.register_post_accumulate_grad_hook(accumulate)
    return master
