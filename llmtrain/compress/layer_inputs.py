"""What a text puts into each matrix of a layer, added up over all of its positions.

Shape suffixes: I inputs, N positions, P pairs of a token and an expert.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from llmtrain.compress.layered import LayerCall
from llmtrain.models.experts.mixture import Experts
from llmtrain.models.stack import Layer


def products(x_NI: Tensor) -> Tensor:
    """[I, I]: the sum of x x^T."""
    return (x_NI.T @ x_NI).double()


def squares(x_NI: Tensor) -> Tensor:
    """[I]: the sum of each input's squares, which is the diagonal of `products`."""
    return x_NI.double().square().sum(0)


class InputSums:
    """The sums over all positions of what goes into each matrix of a layer; of experts by number."""

    def __init__(self, layer: Layer, of_rows: Callable[[Tensor], Tensor] = products) -> None:
        self._layer, self._of_rows = layer, of_rows
        self._sums: dict[tuple[str, int | None], Tensor] = {}
        self._same: dict[str, str] = {}
        self._last: tuple[Tensor, str] | None = None

    def gather(self, calls: Sequence[LayerCall]) -> None:
        """Run the layer, whose output is not needed."""
        hooks, products_of = list[Any](), list[tuple[Experts, Any]]()
        for name, module in self._layer.named_modules():
            if isinstance(module, nn.Linear):
                hooks.append(module.register_forward_pre_hook(self._hook(name)))
            elif isinstance(module, Experts):
                products_of.append((module, module.product))
                module.product = self._watched(name, module)
        try:
            for call in calls:
                self._last = None
                call.through(self._layer)
        finally:
            for hook in hooks:
                hook.remove()
            for experts, product in products_of:
                experts.product = product

    def of(self, name: str, expert: int | None = None) -> Tensor | None:
        """The sum for a matrix by its name in the layer; None where nothing has gone into it."""
        return self._sums.get((self._same.get(name, name), expert))

    def _hook(self, name: str) -> Any:
        def add(linear: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0]
            # Queries, keys and values have one input, and so do gate and up: it is counted once.
            if self._last is not None and self._last[0] is x:
                self._same[name] = self._last[1]
                return
            self._last = (x, name)
            self._add(name, None, x.flatten(0, -2))

        return add

    def _watched(self, prefix: str, experts: Experts) -> Any:
        product, names = experts.product, ("up", "gate", "down")

        def multiplied(x_PI: Tensor, weight: Tensor, counts: Any) -> Tensor:
            name = next(each for each in names if getattr(experts, each) is weight)
            for number, rows in enumerate(x_PI.split(counts)):
                if len(rows):
                    self._add(f"{prefix}.{name}", number, rows)
            return product(x_PI, weight, counts)

        return multiplied

    def _add(self, name: str, expert: int | None, x_NI: Tensor) -> None:
        found, more = self._sums.get((name, expert)), self._of_rows(x_NI)
        self._sums[name, expert] = more if found is None else found.add_(more)
