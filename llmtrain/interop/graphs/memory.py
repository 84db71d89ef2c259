"""Texts through a model's graphs: all at once, or on from the memory of what came before.

Shape suffixes: B rows, S new tokens, T all tokens, V what the head chooses from, H hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmtrain.interop.graphs.ports import PRESENT, Graph, Run

Rows = Sequence[Sequence[int]]


@dataclass(frozen=True)
class GraphModel:
    """The graphs of a model in the order in which data flows, and what runs them."""

    graphs: Sequence[Graph]
    run: Run

    @property
    def main(self) -> Graph:
        """The one with the head."""
        return self.graphs[-1]

    @property
    def has_memory(self) -> bool:
        """True where texts are gone on with."""
        return bool(self.main.memory)

    def read(self, rows: Rows, types: Tensor | None = None) -> dict[str, Tensor]:
        """The outputs of the first graph by their names, for texts that are padded at their ends."""
        tokens_BT, mask_BT = padded(rows)
        graph = self.graphs[0]
        given = {"ids": tokens_BT, "mask": mask_BT} | ({} if types is None else {"types": types})
        found = self.run(graph, [given[port.kind] for port in graph.inputs])
        return {port.name: x for port, x in zip(graph.outputs, found, strict=True)}

    def begin(self, rows: Rows, sources: Rows | None = None) -> tuple[Tensor, "TextMemory"]:
        """([B, S, V] of texts that are padded before their beginnings, the memory of them)."""
        tokens_BS, mask_BS = padded(rows, before=True)
        fixed = list[Tensor]()
        if sources is not None:
            fixed = [padded(sources)[1], *[x for name, x in self.read(sources).items() if name.startswith("memory.")]]
        sizes = {"batch": len(rows), "past": 0}
        past = [port.example(sizes) for port in self.main.memory]
        memory = TextMemory(self, mask_BS[:, :0], fixed, past)
        return memory.extend(tokens_BS, mask_BS), memory


@dataclass(eq=False)
class TextMemory:
    """What some rows have behind them: the mask of their tokens, of an encoder-decoder what they were made from, and
    the tensors that the graph has returned."""

    model: GraphModel
    mask_BT: Tensor
    fixed: list[Tensor]
    past: list[Tensor]

    def extend(self, tokens_BS: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        """[B, S, V], and the memory has the new tokens."""
        new_BS = torch.ones_like(tokens_BS) if mask_BS is None else mask_BS
        self.mask_BT = torch.cat((self.mask_BT, new_BS), 1)
        graph = self.model.main
        logits, *self.past = self.model.run(graph, [tokens_BS, self.mask_BT, *self.fixed, *self.past])
        assert [port.name.split(".")[0] for port in graph.outputs[1:]] == [PRESENT] * len(self.past)
        return logits


def padded(rows: Rows, before: bool = False) -> tuple[Tensor, Tensor]:
    """(ids, mask) of texts: where one is shorter than the longest, zeros stand before or behind it."""
    longest = max(map(len, rows))
    ids = [_filled(row, [0] * (longest - len(row)), before) for row in rows]
    masks = [_filled([1] * len(row), [0] * (longest - len(row)), before) for row in rows]
    return torch.tensor(ids), torch.tensor(masks)


def _filled(row: Sequence[int], filling: list[int], before: bool) -> list[int]:
    return [*filling, *row] if before else [*row, *filling]
