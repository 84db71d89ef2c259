"""The computation of steps: a model, or a part of one, the stores of its layers, and the scores that a step asks for.

Shape suffixes: B rows, S new positions, T the encoder's positions, K blocks of a row, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from llmtrain.infer.batching.scheduler import BatchStep, DecodeRow, Limits, PromptChunk
from llmtrain.infer.links import WHOLE, StageLinks, passed
from llmtrain.models.attention.caches import BlockStore, ChunkCache, MemoryCache, RowCache, RowStates, StateStore
from llmtrain.models.attention.rows import BLOCK, SPARE, RowGroup, Rows, table_length
from llmtrain.models.experts.mixture import Experts, grouped_linear
from llmtrain.models.stack import LayerCaches
from llmtrain.models.transformer import Transformer
from llmtrain.values.batch import ModelInputs

TILE = 8
"""Rows that are multiplied together where a result may not depend on how many there are: a product of matrices adds up
in another order when it has another number of rows."""


class StepRunner(Protocol):
    """Whatever carries out steps."""

    def run(self, step: BatchStep) -> Tensor:
        """[chosen, V] in fp32, in the order of `BatchStep.chosen`."""
        ...


class Arena:
    """A model in evaluation mode with the memory of all sequences; its stores are as large as the limits say.

    Of a part of a model, which `links` join to the others, the memory is that of its own layers and heads, and every
    part is given the same steps.
    """

    def __init__(self, model: Transformer, limits: Limits, links: StageLinks = WHOLE) -> None:
        self.model, self.links = model, links
        self.device = next(model.parameters()).device
        linear, layers = model.config.attention.kind == "linear", model.decoder.layers if model.decoder else ()
        self.own = [StateStore(limits.slots + 1) if linear else BlockStore(limits.blocks + 1) for _ in layers]
        # The keys of an encoder's output are as large as the others: a block has one number for both.
        self.cross = [BlockStore(limits.blocks + 1) for _ in self.own] if model.has_memory else [None] * len(self.own)
        self.tile = decode_tile(model, limits)
        if limits.exact:
            for module in model.modules():
                if isinstance(module, Experts):
                    module.product = tiled_grouped_linear

    @torch.no_grad()
    def run(self, step: BatchStep) -> Tensor:
        """[chosen, V] in fp32, in the order of `BatchStep.chosen`."""
        found = [self._read(chunk) for chunk in step.chunks]
        for start in range(0, len(step.rows), self.tile or len(step.rows) or 1):
            found.append(self._continued(step.rows[start : start + (self.tile or len(step.rows))]))
        logits_CV = torch.cat(found) if found else torch.empty(0, self.model.config.vocabulary, device=self.device)
        return self.links.gathered(logits_CV, len(step.chosen))

    def _read(self, chunk: PromptChunk) -> Tensor:
        """[1, V], or [0, V] where no token is asked for yet."""
        tokens_BS = torch.tensor([chunk.tokens], device=self.device)
        positions_BS = torch.arange(chunk.start, chunk.end, device=self.device)[None]
        caches, begins = list[LayerCaches](), chunk.start == 0
        slots_B = torch.tensor([chunk.slot], device=self.device)
        blocks_K, memory_K = (
            torch.tensor(blocks, device=self.device) for blocks in (chunk.blocks, chunk.memory_blocks)
        )
        for own, cross in zip(self.own, self.cross, strict=True):
            mine = (
                RowStates(own, slots_B, begins)
                if isinstance(own, StateStore)
                else ChunkCache(own, blocks_K, chunk.start)
            )
            memory = None if cross is None else MemoryCache(cross, memory_K, len(chunk.source), begins)
            caches.append(LayerCaches(mine, memory))
        source_BT = torch.tensor([chunk.source if begins else ()], dtype=torch.long, device=self.device)
        inputs = ModelInputs(tokens_BS, positions_BS, encoder_tokens_BT=source_BT)
        return self._scores(inputs, caches, [0] if chunk.chooses else [])

    def _scores(self, inputs: ModelInputs, caches: Sequence[LayerCaches], rows: Sequence[int]) -> Tensor:
        """[rows, V]: of these rows, the scores behind the newest position; of a part that does not end, [0, V]."""
        assert inputs.encoder_tokens_BT is not None
        num_rows, encoded = len(inputs.tokens_BS), inputs.encoder_tokens_BT.shape[1]
        memory_TBH = None
        if self.model.has_memory and not encoded:  # its keys are in the stores: nobody looks at it
            memory_TBH = torch.empty(0, num_rows, self.model.config.hidden_size, device=self.device)
        hidden_SBH, _ = passed(self.model, inputs, self.links, caches, memory_TBH)
        if not self.model.ends or not rows:
            return hidden_SBH.new_empty(0, self.model.config.vocabulary)
        logits_B1V = self.links.logits(self.model, hidden_SBH[-1:])
        return logits_B1V[list(rows), 0]

    def _continued(self, rows: Sequence[DecodeRow]) -> Tensor:
        """[rows that choose, V]."""
        spare = DecodeRow(0, SPARE, 0, 0, (SPARE,), False, 1, (SPARE,))
        padded = [*rows, *[spare] * ((self.tile or len(rows)) - len(rows))]
        tokens, positions, slots, blocks, places = zip(
            *((row.token, row.position, row.slot, row.blocks[-1], row.position % BLOCK) for row in padded), strict=True
        )
        numbers = torch.tensor([tokens, positions, slots, blocks, places], device=self.device)
        placed = Rows(*numbers[2:].unbind())
        groups = self._grouped([(row.position + 1, row.blocks) for row in padded])
        memory_groups = (
            self._grouped([(row.memory_length, row.memory_blocks) for row in padded]) if self.model.has_memory else []
        )
        caches = [
            LayerCaches(
                RowStates(own, placed.slots_B) if isinstance(own, StateStore) else RowCache(own, placed, groups),
                None if cross is None else RowCache(cross, placed, memory_groups),
            )
            for own, cross in zip(self.own, self.cross, strict=True)
        ]
        nothing_BT = numbers.new_empty(len(padded), 0)
        inputs = ModelInputs(numbers[0][:, None], numbers[1][:, None], encoder_tokens_BT=nothing_BT)
        return self._scores(inputs, caches, [number for number, row in enumerate(rows) if row.chooses])

    def _grouped(self, tables: Sequence[tuple[int, Sequence[int]]]) -> list[RowGroup]:
        """Rows by the length of their tables, filled up with the spare block."""
        by_length: defaultdict[int, list[int]] = defaultdict(list)
        for number, (end, _) in enumerate(tables):
            by_length[table_length(end)].append(number)
        return [self._group(length, numbers, tables) for length, numbers in sorted(by_length.items())]

    def _group(self, length: int, numbers: list[int], tables: Sequence[tuple[int, Sequence[int]]]) -> RowGroup:
        blocks = [[*tables[number][1], *[SPARE] * (length - len(tables[number][1]))] for number in numbers]
        ends = [tables[number][0] for number in numbers]
        rows_B, blocks_BK, ends_B = (torch.tensor(values, device=self.device) for values in (numbers, blocks, ends))
        return RowGroup(rows_B, blocks_BK, ends_B, is_all=len(numbers) == len(tables))


def decode_tile(model: Transformer, limits: Limits) -> int | None:
    """Rows of one pass; None: all at once."""
    if model.config.moe is not None and model.config.moe.router == "expert_choice":
        return 1  # experts would choose among the rows of different texts
    return TILE if limits.exact else None


def tiled_grouped_linear(x_PH: Tensor, weight_EFH: Tensor, counts: Tensor | list[int]) -> Tensor:
    """As `grouped_linear`, with as many rows for an expert as if all of a tile were its own."""
    if isinstance(counts, Tensor):
        return grouped_linear(x_PH, weight_EFH, counts)
    parts = list[Tensor]()
    for part_PH, weight_FH in zip(x_PH.split(counts), weight_EFH, strict=True):
        missing = TILE - len(part_PH)
        filled = torch.cat((part_PH, part_PH.new_zeros(missing, part_PH.shape[1]))) if missing > 0 else part_PH
        parts.append((filled @ weight_FH.T)[: len(part_PH)])
    return torch.cat(parts)
