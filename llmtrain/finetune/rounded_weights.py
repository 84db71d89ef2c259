"""Weights that a run with a section `quantize` has computed with: matrices rounded to whole numbers, as floats."""

from torch import Tensor

from llmtrain.checkpoint.reader import CheckpointReader
from llmtrain.checkpoint.saved_run import saved_precision, saved_quantize
from llmtrain.config.finetune import QuantizeConfig
from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import quantized_linears
from llmtrain.values.fragment import Box, FragmentSource
from llmtrain.values.precision import DTYPES
from llmtrain.values.quantization import NumberGrid, round_to_nearest


class RoundedWeights:
    """A source of fragments: each element of a rounded matrix is a function of its whole output, in every layout.

    All else is as `source` has it. `precision` is that of the run, whose type weights and scales are rounded to.
    """

    def __init__(self, source: FragmentSource, model: ModelConfig, quantize: QuantizeConfig, precision: str) -> None:
        self._source, self._dtype = source, DTYPES[precision]
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


def computed_weights(checkpoint: CheckpointReader, model: ModelConfig) -> FragmentSource:
    """The weights of a checkpoint as its run has computed with them: rounded, where it has a section `quantize`."""
    quantize = saved_quantize(checkpoint)
    if quantize is None:
        return checkpoint
    return RoundedWeights(checkpoint, model, quantize, saved_precision(checkpoint))


def linears_with_rounded_inputs(checkpoint: CheckpointReader, model: ModelConfig) -> frozenset[str]:
    """The linears whose inputs the run of a checkpoint has rounded."""
    quantize = saved_quantize(checkpoint)
    if quantize is None or not quantize.numbers.rounds_inputs:
        return frozenset()
    return frozenset(linear for linear, _ in quantized_linears(model, quantize.keep))
