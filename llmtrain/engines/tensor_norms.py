"""The norm of every weight and of its gradient, each of the whole tensor, in any layout."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.config.parameters import declare_parameters
from llmtrain.config.schema import RunConfig
from llmtrain.engines.base import Engine
from llmtrain.values.batch import Batch
from llmtrain.values.fragment import Fragment
from llmtrain.values.progress import StepResult

WEIGHTS, GRADIENTS = "weight_norm/", "grad_norm/"
"""Prefixes of the metrics' names; the parameter's global name follows."""


class MeasuringEngine:
    """An engine whose results carry the norms of all tensors, every few steps; else it is the engine itself.

    Weights are the fp32 masters after the step, gradients those before clipping, without the loss scale. On rank 0 the
    norms are those of the run.
    """

    def __init__(self, engine: Engine, names: Sequence[str], every_steps: int) -> None:
        self._engine = engine
        self._every_steps = every_steps
        self._names = names

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def train_step(self, step: int, micro_batches: Sequence[Batch], lr: float) -> StepResult:
        if step % self._every_steps:
            return self._engine.train_step(step, micro_batches, lr)
        gradients = _Squares(self._names)
        before, self._engine.inspect_gradients = self._engine.inspect_gradients, gradients.add
        try:
            result = self._engine.train_step(step, micro_batches, lr)
        finally:
            self._engine.inspect_gradients = before
        weights = _Squares(self._names)
        weights.add(fragment for fragment in self._engine.fragments() if fragment.kind == "master")
        norms = torch.stack((weights.total(), gradients.total()))
        if dist.is_initialized():
            dist.all_reduce(norms)  # sums of squares over all ranks, on the host as the fragments are
        columns = zip((WEIGHTS, GRADIENTS), norms.sqrt().tolist(), strict=True)
        metrics = {group + name: norm for group, row in columns for name, norm in zip(self._names, row, strict=True)}
        return replace(result, metrics={**result.metrics, **metrics})


def measuring(engine: Engine, config: RunConfig) -> Engine:
    """The engine, with norms of all that it trains every `observe.layer_norms_every_steps` steps; 0: never."""
    every_steps = config.observe.layer_norms_every_steps
    names = [name for name in declare_parameters(config.model, config.finetune) if name not in config.frozen]
    return cast(Engine, MeasuringEngine(engine, names, every_steps)) if every_steps else engine


class _Squares:
    """Sums of squares by tensor, of the elements that this rank holds."""

    def __init__(self, names: Sequence[str]) -> None:
        self._place = {name: number for number, name in enumerate(names)}
        self._sums: dict[torch.device, Tensor] = {}  # kept where the fragments are: the host need not wait for each

    def add(self, fragments: Iterable[Fragment]) -> None:
        for fragment in fragments:
            device = fragment.tensor.device
            if device not in self._sums:
                self._sums[device] = torch.zeros(len(self._place), dtype=torch.float64, device=device)
            norm = torch.linalg.vector_norm(fragment.tensor.detach(), dtype=torch.float64)
            self._sums[device][self._place[fragment.name]] += norm.square()

    def total(self) -> Tensor:
        """The sums of all devices, on the host, which waits here."""
        return sum((sums.cpu() for sums in self._sums.values()), torch.zeros(len(self._place), dtype=torch.float64))
