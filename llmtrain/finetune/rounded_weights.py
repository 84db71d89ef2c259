"""Weights that a run with a section `quantize` has computed with: matrices rounded to whole numbers, as floats."""

from torch import Tensor

from llmtrain.checkpoint.reader import CheckpointReader
from llmtrain.checkpoint.saved_run import saved_finetune, saved_precision, saved_quantize
from llmtrain.config.finetune import QuantizeConfig
from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import FrozenNames, frozen_by, quantized_linears
from llmtrain.values.fragment import Box, FragmentSource
from llmtrain.values.precision import DTYPES
from llmtrain.values.quantization import NumberGrid, round_to_nearest, unless_rounded


class RoundedWeights:
    """A source of fragments: each element of a rounded matrix is a function of its whole output, in every layout.

    All else is as `source` has it. `precision` is that of the run, whose type weights and scales are rounded to;
    `frozen` says which weights are a base.
    """

    def __init__(
        self, source: FragmentSource, model: ModelConfig, quantize: QuantizeConfig, precision: str, frozen: FrozenNames
    ) -> None:
        self._source, self._dtype, self._frozen = source, DTYPES[precision], frozen
        self._grid = NumberGrid(quantize.numbers.bits, quantize.numbers.group)
        self._columns = {weight.name: weight.shape[-1] for _, weight in quantized_linears(model, quantize.keep)}

    def global_shape(self, name: str, kind: str) -> tuple[int, ...] | None:
        return self._source.global_shape(name, kind)

    def read(self, name: str, kind: str, box: Box) -> Tensor:
        if name not in self._columns or kind != "master":
            return self._source.read(name, kind, box)
        outputs = Box((*box.offsets[:-1], 0), (*box.shape[:-1], self._columns[name]))
        weight_OI = self._source.read(name, kind, outputs).flatten(0, -2)
        rounded = round_to_nearest(weight_OI.to(self._dtype), self._grid, self._dtype)
        if self._frozen.is_base(name):
            rounded = unless_rounded(weight_OI, rounded, self._grid)
        return rounded.dequantized().to(self._dtype).float().view(outputs.shape)[box.slices_in(outputs)]


def computed_weights(checkpoint: CheckpointReader, model: ModelConfig) -> FragmentSource:
    """The weights of a checkpoint as its run has computed with them: rounded, where it has a section `quantize`."""
    quantize = saved_quantize(checkpoint)
    if quantize is None:
        return checkpoint
    frozen = frozen_by((), saved_finetune(checkpoint))
    return RoundedWeights(checkpoint, model, quantize, saved_precision(checkpoint), frozen)


def linears_with_rounded_inputs(checkpoint: CheckpointReader, model: ModelConfig) -> frozenset[str]:
    """The linears whose inputs the run of a checkpoint has rounded."""
    quantize = saved_quantize(checkpoint)
    if quantize is None or not quantize.numbers.rounds_inputs:
        return frozenset()
    return frozenset(linear for linear, _ in quantized_linears(model, quantize.keep))
