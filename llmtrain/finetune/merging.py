"""Weights with their low-rank updates added: a source of fragments of the plain model."""

import torch
from torch import Tensor

from llmtrain.config.finetune import FinetuneConfig
from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import declare_parameters
from llmtrain.values.fragment import Box, FragmentSource


class MergedWeights:
    """W + scale B A where a weight has an update, in fp32; all else as the source has it.

    Any box of a weight follows from the rows of B and the columns of A that it crosses.
    """

    def __init__(self, source: FragmentSource, model: ModelConfig, finetune: FinetuneConfig) -> None:
        self._source = source
        self._scale = finetune.lora.scale
        self._declared = declare_parameters(model, finetune)

    def global_shape(self, name: str, kind: str) -> tuple[int, ...] | None:
        return self._source.global_shape(name, kind)

    def read(self, name: str, kind: str, box: Box) -> Tensor:
        weight = self._source.read(name, kind, box)
        prefix = name.removesuffix(".weight")
        prefix = f"{prefix}.lora" if name.endswith(".weight") else f"{prefix}_lora"
        a, b = self._declared.get(f"{prefix}_a"), self._declared.get(f"{prefix}_b")
        if kind != "master" or a is None or b is None:
            return weight
        *stacked, row, column = box.offsets
        *counts, rows, columns = box.shape
        rank = a.shape[-2]
        a_part = self._source.read(a.name, kind, Box((*stacked, 0, column), (*counts, rank, columns)))
        b_part = self._source.read(b.name, kind, Box((*stacked, row, 0), (*counts, rows, rank)))
        return weight.float() + self._scale * torch.matmul(b_part.float(), a_part.float())
