"""The types of numbers that `train.precision` names.

| Precision | Weights, activations | Products | Loss scale |
| --- | --- | --- | --- |
| fp32 | float32 | float32 | none |
| bf16 | bfloat16 | bfloat16 | none |
| fp16 | float16 | float16 | one that adapts |
| fp8 | bfloat16 | float8, those of the layers' linears | none |

Masters, moments and sums of gradients are in float32 under all of them, and so are checkpoints.
"""

import torch

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.bfloat16,
}
"""Of weights and activations, and of the scales of weights that are rounded to whole numbers."""


def known_precision(value: object) -> str:
    """A value that was read, where it names a precision. Raises ValueError for another."""
    if not isinstance(value, str) or value not in DTYPES:
        raise ValueError(f"must be one of {', '.join(DTYPES)}, and is {value!r}")
    return value


def type_name(precision: str) -> str:
    """What files of weights, and the option --dtype, call the type: bfloat16, say."""
    return str(DTYPES[precision]).removeprefix("torch.")
