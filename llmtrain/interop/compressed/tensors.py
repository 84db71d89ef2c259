"""One quantized matrix as the tensors of a file, and back.

Shape suffixes: O outputs, I inputs, G groups of inputs, P words of an output.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from llmtrain.errors import DataError
from llmtrain.interop.compressed.form import QuantizedForm
from llmtrain.interop.folder_files import STORED_ENDS, Header
from llmtrain.values.quantization import Quantized

WEIGHT = ".weight"
PARTS = ("", *STORED_ENDS)
_FOREIGN = {
    "_zero_point": "numbers around another value than zero",
    "_g_idx": "columns in another order",
    "_global_scale": "scales of scales",
}
_WORD = 32
QUANTIZED = "quantized"
"""In a header, in place of a type: the parts of a matrix."""
_SCALES = ("F32", "BF16", "F16")


def packed(numbers_OI: Tensor, bits: int) -> Tensor:
    """[O, P] of int32: the first number in the lowest bits, above zero by half of the grid."""
    per_word = _WORD // bits
    filled = torch.nn.functional.pad(numbers_OI.long() + (1 << (bits - 1)), (0, -numbers_OI.shape[1] % per_word))
    shifts = torch.arange(per_word) * bits
    return (filled.unflatten(1, (-1, per_word)) << shifts).sum(-1).to(torch.int32)  # the sum of 32 bits wraps


def unpacked(words_OP: Tensor, bits: int, inputs: int) -> Tensor:
    """[O, I] of int8: what `packed` has made."""
    shifts = torch.arange(_WORD // bits, dtype=torch.int32) * bits
    numbers = (words_OP[..., None] >> shifts) & ((1 << bits) - 1)
    return (numbers.flatten(1)[:, :inputs] - (1 << (bits - 1))).to(torch.int8)


def iter_parts(name: str, matrix: Quantized, form: QuantizedForm) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a matrix whose weight has a name; a transposed one lies as [in, out]."""
    numbers, scale = matrix.numbers_OI, matrix.scale_OG
    if form.transposed:
        numbers, scale = numbers.T.contiguous(), scale.T.contiguous()
    if form.rounds_inputs:
        yield name, numbers
    else:
        yield f"{name}_packed", packed(numbers, form.bits)
        yield f"{name}_shape", torch.tensor(numbers.shape)
    # Where transformers undoes it, it multiplies in the type of the scales, and would round each weight to that.
    yield f"{name}_scale", scale.float() if form.dequantize else scale


@dataclass(frozen=True)
class StoredNumbers:
    """The quantized matrices of a folder: their parts by the name of the weight."""

    form: QuantizedForm
    parts: Mapping[str, Mapping[str, Header]] = field(default_factory=dict)

    def weight(self, name: str) -> Tensor:
        """The matrix as its file has it, dequantized, in fp32. Raises as `read`."""
        numbers, scale = self.read(name)
        if not self.form.transposed:
            return Quantized(numbers, scale).dequantized()
        return Quantized(numbers.T, scale.T).dequantized().T.contiguous()

    def read(self, name: str) -> tuple[Tensor, Tensor]:
        """The numbers of a matrix and their scales in fp32, as the file has them: [out, in] and [out, groups], or both
        transposed. Raises DataError for scales that are none."""
        parts = self.parts[name]
        rows, columns = matrix_shape(parts)
        stored = {part: _read(header) for part, header in parts.items()}
        numbers = stored[""] if self.form.rounds_inputs else unpacked(stored["_packed"], self.form.bits, columns)
        scale = stored["_scale"].float()
        if not bool(torch.isfinite(scale).all()) or not bool((scale > 0).all()):
            header = parts["_scale"]
            raise DataError(
                f"{header.file}: {header.name}: has scales that are no positive numbers. Quantize the model again."
            )
        assert numbers.shape == (rows, columns)
        return numbers, scale


def _read(header: Header) -> Tensor:
    with safe_open(header.file, framework="pt") as file:
        return file.get_tensor(header.name)


def matrix_shape(parts: Mapping[str, Header]) -> tuple[int, ...]:
    """The shape of the stored matrix. Raises DataError for one that is none."""
    if "_shape" not in parts:
        return parts[""].shape
    header = parts["_shape"]
    if header.shape != (2,) or header.dtype not in ("I64", "I32"):
        raise DataError(f"{header.file}: {header.name}: must be two whole numbers: {header.dtype} {header.shape}.")
    return tuple(_read(header).tolist())


def gathered(path: Path, headers: Mapping[str, Header], form: QuantizedForm) -> tuple[dict[str, Header], StoredNumbers]:
    """The headers with one for each quantized matrix in place of its parts, and the matrices.

    Raises DataError where parts are missing, of another form, or do not fit each other.
    """
    names = {name.removesuffix(part) for part in PARTS[1:] for name in headers if name.endswith(f"{WEIGHT}{part}")}
    stored, problems, whole = dict[str, dict[str, Header]](), list[str](), dict(headers)
    for name in sorted(names):
        found = {part: whole.pop(name + part) for part in PARTS if name + part in whole}
        problem = _problem(found, form)
        if problem is not None:
            problems.append(f"{name}: {problem}")
            continue
        stored[name] = found
        first = next(iter(found.values()))
        whole[name] = Header(first.file, name, QUANTIZED, matrix_shape(found))
    problems += [
        f"{name}: {reason}, which llmtrain does not read"
        for name in sorted(headers)
        for part, reason in _FOREIGN.items()
        if name.endswith(f"{WEIGHT}{part}")
    ]
    if not names:
        problems.append("config.json says that matrices are quantized, and none is")
    if problems:
        listed = "\n  ".join(problems[:10])
        raise DataError(f"{path}: quantized weights cannot be read ({len(problems)} problems):\n  {listed}")
    return whole, StoredNumbers(form, stored)


def _problem(found: Mapping[str, Header], form: QuantizedForm) -> str | None:
    """What is wrong with the parts of a matrix; None where nothing is."""
    expected = ("", "_scale") if form.rounds_inputs else ("_packed", "_scale", "_shape")
    missing = [f"weight{part}" for part in expected if part not in found]
    foreign = [f"weight{part}" for part in found if part not in expected]
    if missing or foreign:
        told = ", ".join([*(f"{part} is missing" for part in missing), *(f"{part} is none of it" for part in foreign)])
        return f"{form.format} has {', '.join(f'weight{part}' for part in expected)}: {told}"
    numbers, scale, shape = found[expected[0]], found["_scale"], matrix_shape(found)
    kind, per_word = ("I8", 1) if form.rounds_inputs else ("I32", _WORD // form.bits)
    if numbers.dtype != kind or scale.dtype not in _SCALES:
        return f"numbers are {numbers.dtype} and must be {kind}; scales are {scale.dtype} of {', '.join(_SCALES)}"
    if len(shape) != 2 or min(shape) < 1 or numbers.shape != (shape[0], -(-shape[1] // per_word)):
        return f"numbers of the shape {list(numbers.shape)} do not make a matrix {list(shape)}"
    outputs, inputs = shape[::-1] if form.transposed else shape
    group = form.group or inputs
    if group < inputs and inputs % group:
        return f"groups of {group} do not divide {inputs} inputs"
    groups = -(-inputs // group)
    scales = (groups, outputs) if form.transposed else (outputs, groups)
    if scale.shape != scales:
        return f"scales have the shape {list(scale.shape)}, and {list(shape)} in groups of {group} needs {list(scales)}"
    return None
