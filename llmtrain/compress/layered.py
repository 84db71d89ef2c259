"""A model that is run layer after layer over all texts at once: only one layer's weights are in memory at a time.

Shape suffixes: S sequence, B micro-batch, H hidden.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from llmtrain.config.model import ModelConfig
from llmtrain.interop.name_table import ReadTensor
from llmtrain.models.head import Objective
from llmtrain.models.rounded_inputs import round_inputs
from llmtrain.models.stack import Layer, LayerInputs, Stack
from llmtrain.models.transformer import build_model, chosen_from
from llmtrain.values.batch import Batch

_CHUNK_TOKENS = 2048
_Done = dict[int, list[Tensor]]
"""The outputs of stacks, by identity, for every micro-batch."""


class _ReachedError(Exception):
    """Carries the input of a stack out of the model's forward pass."""

    def __init__(self, call: "LayerCall") -> None:
        self.call = call


@dataclass(frozen=True)
class LayerCall:
    """The input of a layer for one micro-batch."""

    x_SBH: Tensor
    inputs: LayerInputs

    def through(self, layer: Layer) -> Tensor:
        """The layer's output."""
        return layer(self.x_SBH, self.inputs)[0]


class LayeredModel:
    """A model on the meta device, of which the layers have memory only while they run.

    What stands outside of layers (embeddings, norms, heads) is kept. `rounded` are linears whose inputs are rounded,
    `without` layers that are passed over.
    """

    def __init__(
        self,
        config: ModelConfig,
        read: ReadTensor,
        rounded: frozenset[str] = frozenset(),
        without: frozenset[str] = frozenset(),
    ) -> None:
        self.config, self._read, self._without = config, read, without
        self.model = build_model(config).eval()
        round_inputs(self.model, rounded)
        for name, module in self.model.named_children():
            if isinstance(module, Stack):
                for inner, child in module.named_children():
                    if inner != "layers":
                        self._fill(child, f"{name}.{inner}")
            else:
                self._fill(module, name)

    def _fill(self, module: nn.Module, prefix: str) -> None:
        """Give a module its memory and its weights."""
        module.to_empty(device="cpu")
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(False).copy_(self._read(f"{prefix}.{name}"))

    @torch.no_grad()
    def iter_layers(self, batches: Sequence[Batch]) -> Iterator[tuple[str, Layer, list[LayerCall]]]:
        """Each layer with its global name, its weights and what goes into it; what comes out of it goes on.

        Whoever changes the weights meanwhile changes what the next layers get. `hidden` has the end of it.
        """
        done: _Done = {}
        for stack in self.model.stacks:
            calls = [self._reach(stack, batch, done, number) for number, batch in enumerate(batches)]
            for number, layer in stack.layers.items():
                assert isinstance(layer, Layer)
                if (name := f"{stack.side}.layers.{number}") in self._without:
                    continue
                self._fill(layer, name)
                yield name, layer, calls
                calls = [replace(call, x_SBH=call.through(layer)) for call in calls]
                layer.to("meta")
            norm = stack.final_norm or (lambda x_SBH: x_SBH)
            done[id(stack)] = [norm(call.x_SBH) for call in calls]
        self.hidden = [self._run(batch, done, number)[0] for number, batch in enumerate(batches)]

    def _reach(self, stack: Stack, batch: Batch, done: _Done, number: int) -> LayerCall:
        """What goes into the layers of a stack."""

        def stop(x_SBH: Tensor, inputs: LayerInputs, caches: Any = None) -> NoReturn:
            raise _ReachedError(LayerCall(x_SBH, inputs))

        try:
            self._run(batch, done, number, {id(stack): stop})
        except _ReachedError as reached:
            return reached.call
        raise AssertionError("every stack is reached")

    def _run(
        self,
        batch: Batch,
        done: _Done,
        number: int,
        instead: dict[int, Callable[..., Any]] | None = None,
    ) -> Any:
        """The model's forward pass; stacks that are done give what they have, `instead` says what others do."""
        told = {place: (lambda *_, x=outputs[number]: (x, {})) for place, outputs in done.items()} | (instead or {})
        for stack in self.model.stacks:
            if id(stack) in told:
                stack.__dict__["forward"] = told[id(stack)]  # found before that of the class
        try:
            return self.model(batch)
        finally:
            for stack in self.model.stacks:
                stack.__dict__.pop("forward", None)

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """[B, S, V] in fp32, as `Transformer.logits`."""
        for _ in self.iter_layers([batch]):
            pass
        return self.model.logits(self.hidden[0], batch)

    @torch.no_grad()
    def perplexity(self, batches: Sequence[Batch]) -> float:
        """exp of the mean loss of all targets, fp32 summed in fp64."""
        for _ in self.iter_layers(batches):
            pass
        objective = Objective(1.0, _CHUNK_TOKENS, chosen_from(self.config))
        total = 0.0
        for hidden_SBH, batch in zip(self.hidden, batches, strict=True):
            loss = self.model.loss(hidden_SBH, batch.labels_BS, objective, batch)[1]
            total += float(loss.flatten()[0])  # behind a label head's loss stand its counts
        mean = total / sum(batch.num_valid_tokens for batch in batches)
        return math.exp(mean) if mean < 700 else math.inf
