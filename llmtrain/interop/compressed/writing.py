"""A model's weights in quantized form, for an export: written one matrix at a time, and read again from the files."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import iter_linears
from llmtrain.interop.compressed.choice import MatrixChoice
from llmtrain.interop.compressed.form import KEY
from llmtrain.interop.compressed.tensors import WEIGHT, iter_parts
from llmtrain.interop.examples import Logits
from llmtrain.interop.hf_import import open_hf_folder
from llmtrain.interop.name_table import ReadTensor, Table, pairings, to_theirs
from llmtrain.values.quantization import Quantized

READER = "compressed_tensors"
"""The package without which transformers reads no such folder."""


class Quantizer(Protocol):
    """Makes whole numbers of a weight by its global name, of stacked experts of one. It is asked layer after layer."""

    def __call__(self, name: str, expert: int | None = None) -> Quantized: ...


@dataclass(frozen=True)
class QuantizedWeights:
    """The weights of an export of a model in quantized form: see `hf_export.StoredForm`.

    `read` gives the weights that stay; `build` makes a model of what was written, with the linears whose inputs are
    rounded. `dtype` is the type of scales and of what stays. `accept` judges a folder that is written and proved, and
    returns facts for its card.
    """

    model: ModelConfig
    choice: MatrixChoice
    read: ReadTensor
    quantize: Quantizer
    build: Callable[[ModelConfig, ReadTensor, frozenset[str]], Logits]
    dtype: torch.dtype
    accept: Callable[[Path], Mapping[str, str]]

    @property
    def unread(self) -> str | None:
        """Why transformers cannot be asked to read it; None where it can."""
        return None if find_spec(READER) else "compressed-tensors is not installed here"

    def config(self, table: Table) -> dict[str, Any]:
        """Keys of config.json."""
        return {KEY: self.choice.form.to_config(self.choice.ignored(table, self.model))}

    def iter_tensors(self, table: Table, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the files, made one matrix at a time."""
        for pairing in pairings(table, self.model):
            if self.choice.is_quantized(pairing.ours[0]):
                found = [self.quantize(name, pairing.expert) for name in pairing.ours]
                matrix = Quantized(
                    torch.cat([each.numbers_OI for each in found]), torch.cat([each.scale_OG for each in found])
                )
                yield from iter_parts(pairing.theirs, matrix, self.choice.form)
                continue
            tensor = to_theirs(pairing, [self.read(name, pairing.expert) for name in pairing.ours], self.model).to(
                dtype
            )
            yield pairing.theirs, tensor
            for copy in pairing.written_copies:
                yield copy, tensor.clone()

    def reader(self, folder: Path) -> ReadTensor:
        """Reads a folder as llmtrain reads it, and with what transformers rounds of it."""
        read = open_hf_folder(folder).tensor
        if not self.choice.rounds_experts:
            return read
        experts = {linear for linear, weight in iter_linears(self.model) if weight.expert} & self.choice.linears

        def rounded(name: str, expert: int | None = None) -> Tensor:
            weight = read(name, expert)
            return weight.to(self.dtype).float() if name in experts else weight

        return rounded

    def logits(self, model: ModelConfig, read: ReadTensor) -> Logits:
        """What such a model computes."""
        return self.build(model, read, self.choice.linears if self.choice.form.rounds_inputs else frozenset())

    def unrounded(self, model: ModelConfig, read: ReadTensor) -> Logits | None:
        """The same without the rounding of activations; None where there is none."""
        return self.build(model, read, frozenset()) if self.choice.form.rounds_inputs else None

    def part(self, model: ModelConfig, names: Mapping[str, str]) -> "QuantizedWeights":
        """The form of some layers as a model of their own."""
        linears = (name.removesuffix(WEIGHT) for name, whole in names.items() if self.choice.is_quantized(whole))
        return replace(self, model=model, choice=replace(self.choice, linears=frozenset(linears)))
