"""One-shot pruning: the weights of a model with some of them zero, a tensor at a time.

Shape suffixes: O outputs, I inputs, E experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmtrain.compress.layer_inputs import InputSums, squares
from llmtrain.compress.layered import LayeredModel
from llmtrain.compress.sparsity import GROUP, key_of_rank, magnitude_bits, magnitude_keys, pruned_of_four
from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import is_kept, iter_linears
from llmtrain.config.rules.finetune import misnamed_linears
from llmtrain.errors import ConfigError
from llmtrain.interop.name_table import ReadTensor
from llmtrain.values.batch import Batch


@dataclass(frozen=True)
class Zeros:
    """Which weights become zero: of the tensors in `names` a share, or two of every four neighbours along the input.

    By magnitude they are those that `prune` in training would take. With `norms`, by tensor the norm of each input,
    they are those of the smallest magnitude x norm, of each output by itself (Sun et al. 2023, "Wanda", section 3).
    """

    names: frozenset[str]
    kind: str
    sparsity: float
    norms: Mapping[str, Tensor] = field(default_factory=dict)

    def cut(self, dense: ReadTensor) -> ReadTensor:
        """Reads the tensors of the model, whole, with their zeros."""

        def read(name: str, expert: int | None = None) -> Tensor:
            if name not in self.names:
                return dense(name, expert)
            weight = dense(name)
            pruned = weight.masked_fill(self.pruned(weight, self.norms.get(name)), 0.0)
            return pruned if expert is None else pruned[expert]

        return read

    def pruned(self, weight: Tensor, norms: Tensor | None) -> Tensor:
        """True for what becomes zero of a weight [O, I] or [E, O, I]."""
        scores = weight if norms is None else weight.abs() * norms
        if self.kind == "2:4":
            return pruned_of_four(magnitude_bits(scores).view(-1, GROUP)).view_as(weight)
        if norms is not None:
            count = int(self.sparsity * weight.shape[-1])
            smallest = scores.argsort(dim=-1, stable=True)[..., :count]
            return torch.zeros_like(weight, dtype=torch.bool).scatter_(-1, smallest, True)
        keys = magnitude_keys(weight.flatten(), torch.arange(weight.numel()))
        counts = torch.tensor([int(self.sparsity * weight.numel())])
        return (keys <= key_of_rank(lambda: iter([(0, keys)]), counts, lambda histograms: None)).view_as(weight)


def choose_zeros(model: ModelConfig, kind: str, sparsity: float, keep: Sequence[str]) -> Zeros:
    """Those of all linears of the layers but the ones that `keep` means. Raises ConfigError where that cannot be."""
    linears = dict(iter_linears(model))
    for problem in misnamed_linears("--keep", keep, model, is_kept):
        raise ConfigError(f"--keep {problem.value}: {problem.message}")
    chosen = {
        linear: weight for linear, weight in linears.items() if not any(is_kept(linear, pattern) for pattern in keep)
    }
    if not chosen:
        raise ConfigError(f"--keep {' '.join(keep)}: leaves nothing to prune. Keep less.")
    for linear, weight in chosen.items():
        if kind == "2:4" and weight.shape[-1] % GROUP:
            raise ConfigError(
                f"--prune 2:4: takes groups of {GROUP} inputs, and {linear} has {weight.shape[-1]}. Leave it out with "
                f"--keep {linear}, or try --prune weights."
            )
    return Zeros(frozenset(weight.name for weight in chosen.values()), kind, sparsity)


def input_norms(zeros: Zeros, model: LayeredModel, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """By tensor, [I] or of stacked experts [E, 1, I]: the norm of each of its inputs over a text.

    Layer after layer, with what the pruned layers before have put out. An expert that nothing reaches goes by
    magnitude.
    """
    found = dict[str, Tensor]()
    for layer, module, calls in model.iter_layers(batches):
        sums = InputSums(module, squares)
        sums.gather(calls)
        for leaf, weight in module.named_parameters():
            if (name := f"{layer}.{leaf}") in zeros.names:
                found[name] = _norms(sums, leaf.removesuffix(".weight"), weight)
                weight.masked_fill_(zeros.pruned(weight, found[name]), 0.0)
    return found


def _norms(sums: InputSums, linear: str, weight: Tensor) -> Tensor:
    def of(expert: int | None) -> Tensor:
        sum_I = sums.of(linear, expert)
        return weight.new_ones(weight.shape[-1]) if sum_I is None else sum_I.sqrt().float()

    return of(None) if weight.dim() == 2 else torch.stack([of(expert)[None] for expert in range(len(weight))])
