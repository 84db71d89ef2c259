"""A base whose matrices are rounded to whole numbers while something beside them is trained: as training sees it."""

import torch
from torch import Tensor

from llmtrain.config.finetune import QuantizeConfig
from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import quantized_linears
from llmtrain.values.fragment import Box, FragmentSource
from llmtrain.values.quantization import NumberGrid, round_to_nearest

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Of weights and scales, by train.precision."""


class RoundedBase:
    """A source of fragments: each element of a rounded matrix is a function of its whole output, in every layout."""

    def __init__(self, source: FragmentSource, model: ModelConfig, quantize: QuantizeConfig, precision: str) -> None:
        self._source, self._dtype = source, TYPES[precision]
        self._grid = NumberGrid(quantize.numbers.bits, quantize.numbers.group)
        self._columns = {weight.name: weight.shape[-1] for _, weight in quantized_linears(model, quantize.keep)}

    def global_shape(self, name: str, kind: str) -> tuple[int, ...] | None:
        return self._source.global_shape(name, kind)

    def read(self, name: str, kind: str, box: Box) -> Tensor:
        if name not in self._columns or kind != "master":
            return self._source.read(name, kind, box)
        outputs = Box((*box.offsets[:-1], 0), (*box.shape[:-1], self._columns[name]))
        weight = self._source.read(name, kind, outputs).to(self._dtype)
        rounded = round_to_nearest(weight.flatten(0, -2), self._grid, self._dtype).dequantized()
        return rounded.to(self._dtype).float().view(outputs.shape)[box.slices_in(outputs)]
