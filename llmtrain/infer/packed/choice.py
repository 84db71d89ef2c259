"""Which matrices of a quantized model stay in whole numbers, and by which kernel they are multiplied.

The rule knows shapes, scales and the use, and measures nothing: the same command computes the same numbers again. Where
its bounds come from: docs/design/packed-kernels.md.
"""

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from llmtrain.config.parameters import Parameter, iter_linears
from llmtrain.errors import ConfigError
from llmtrain.infer.packed.linears import put_experts, put_linear
from llmtrain.infer.packed.products import (
    KERNEL_GROUPS,
    KERNEL_OUTPUTS,
    MOST_INPUTS,
    Product,
    four_bit_product,
    sums_are_exact,
    whole_product,
)
from llmtrain.interop.compressed.form import QuantizedForm
from llmtrain.models.transformer import Transformer
from llmtrain.values.quantization import Quantized
from llmtrain.words import short_bytes

KernelNames = Literal["auto", "packed", "plain"]
"""packed: all that there is a kernel for. auto: where it is faster. plain: none; all is dequantized when it is read."""

Use = Literal["writing", "reading"]
"""What is done most: one token of some texts at a time, or many tokens at once."""

Kernel = Literal["whole", "four_bit"]
WORDS: dict[Kernel, str] = {"whole": "8-bit numbers with exact sums", "four_bit": "4-bit numbers in bfloat16"}

FAST_WHOLE, FAST_FOUR_BIT = 1 << 20, 1 << 18
"""Weights of the smallest matrix for which each kernel is faster than fp32."""
FAST_DIGITS = 1 << 24
"""The same for many rows at once whose inputs have three digits, which are three rows each."""
TOO_SMALL = "too small to be faster"
NO_KERNEL = f"kernels know a scale for each output, or 4 bits and groups of {', '.join(map(str, KERNEL_GROUPS))} inputs"


@dataclass(frozen=True)
class StoredMatrices:
    """The quantized weights of a folder, by our names; of stacked experts one at a time is read."""

    form: QuantizedForm
    weights: frozenset[str]
    read: Callable[[str, int | None], Quantized]


@dataclass(frozen=True)
class KernelChoice:
    """What was asked for, and what the model is for."""

    kernels: KernelNames = "plain"
    use: Use = "writing"

    def kernel(self, form: QuantizedForm, shape: tuple[int, ...], device: torch.device) -> tuple[Kernel | None, str]:
        """(the kernel of a matrix [out, in] on a device, why there is none)."""
        if self.kernels == "plain":
            return None, "so it was asked for"
        if device.type != "cpu":
            return None, "the kernels are for CPUs"
        outputs, inputs = shape[-2:]
        group, size = form.grid(inputs).group, outputs * inputs
        is_wanted = self.kernels == "packed"
        if group is None and inputs <= MOST_INPUTS:
            if not sums_are_exact():
                return None, "this CPU has no VNNI, and loses bits of sums of 8-bit products"
            least = FAST_DIGITS if self.use == "reading" and not form.rounds_inputs else FAST_WHOLE
            return ("whole", "") if is_wanted or size >= least else (None, TOO_SMALL)
        if form.bits != 4 or form.rounds_inputs or group not in KERNEL_GROUPS or outputs % KERNEL_OUTPUTS:
            return None, NO_KERNEL
        if not is_wanted and self.use == "reading":
            return None, "reading is not faster with 4 bits"
        return ("four_bit", "") if is_wanted or size >= FAST_FOUR_BIT else (None, TOO_SMALL)


@dataclass
class MatrixPacking:
    """Puts products in place of linears and experts of a model, and knows what it has done.

    `linears` are products now; `sizes` are the bytes of what each kernel has, matrix by matrix; `reasons` say why how
    many other matrices are dequantized.
    """

    choice: KernelChoice
    matrices: StoredMatrices | None
    device: torch.device
    linears: set[str] = field(default_factory=set)
    sizes: dict[Kernel, list[int]] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)

    def put_into(self, model: Transformer) -> None:
        """Put them into a model whose memory is not made yet.

        Raises ConfigError where `packed` is asked for and nothing can be packed, and as `StoredMatrices.read`.
        """
        if self.matrices is not None:
            for place, weights in _places(model, self.matrices).items():
                self._pack(model, place, weights, self.matrices)
        if self.choice.kernels == "packed" and not self.sizes:
            why = ", ".join(self.reasons) or "no matrix of the model is in whole numbers, or an adapter goes with them"
            raise ConfigError(f"--kernels packed: there is nothing to pack: {why}. Give auto or plain.")

    def _pack(self, model: Transformer, place: str, weights: list[Parameter], matrices: StoredMatrices) -> None:
        """Put products in place of a linear, or of all experts of a layer, or of none of them."""
        found = [self.choice.kernel(matrices.form, weight.shape, self.device) for weight in weights]
        kernels: list[Kernel] = [kernel for kernel, _ in found if kernel is not None]
        if len(kernels) < len(weights):
            self.reasons[next(reason for kernel, reason in found if kernel is None)] += len(weights)
            return
        products = [_products(*each, matrices) for each in zip(weights, kernels, strict=True)]
        for kernel, parts in zip(kernels, products, strict=True):
            self.sizes.setdefault(kernel, []).append(sum(part.num_bytes for part in parts))
        if weights[0].expert:
            names = (weight.name.rpartition(".")[2] for weight in weights)
            put_experts(model, place, dict(zip(names, products, strict=True)))
        else:
            put_linear(model, place, products[0][0])
        self.linears.update(weight.name.removesuffix(".weight") for weight in weights)

    @property
    def told(self) -> str:
        """What was done in words; "" where the model has no such matrices."""
        total = sum(map(len, self.sizes.values())) + self.reasons.total()
        parts = [
            f"{len(sizes)} of {total} matrices multiplied as {WORDS[kernel]}, {short_bytes(sum(sizes))}"
            for kernel, sizes in self.sizes.items()
        ]
        parts += [f"{count} of {total} matrices dequantized: {reason}" for reason, count in self.reasons.items()]
        return "; ".join(parts)

    def identity(self, of_model: str) -> str:
        """A model's hash, or another one where kernels compute other numbers."""
        counts = {kernel: len(sizes) for kernel, sizes in self.sizes.items()}
        return hashlib.sha256(repr((of_model, counts)).encode()).hexdigest() if counts else of_model


def _places(model: Transformer, matrices: StoredMatrices) -> dict[str, list[Parameter]]:
    """The quantized weights by their modules: of each linear one, and of a layer's experts all."""
    places: dict[str, list[Parameter]] = {}
    for _, weight in iter_linears(model.config):
        if weight.name in matrices.weights:
            places.setdefault(weight.name.rpartition(".")[0], []).append(weight)
    return places


def _products(weight: Parameter, kernel: Kernel, matrices: StoredMatrices) -> list[Product]:
    """The product of a weight, of stacked experts that of each."""
    experts = range(weight.shape[0]) if weight.expert else (None,)
    stored = (matrices.read(weight.name, expert) for expert in experts)
    if kernel == "four_bit":
        return [four_bit_product(matrix) for matrix in stored]
    return [whole_product(matrix, matrices.form.rounds_inputs) for matrix in stored]
