"""What rounding leaves of an update that is added to a weight: small updates of large weights are mostly lost."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from llmtrain.config.finetune import FinetuneConfig
from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import declare_parameters
from llmtrain.values.fragment import Box, FragmentSource


def rounding_error(source: FragmentSource, model: ModelConfig, finetune: FinetuneConfig, dtype: torch.dtype) -> float:
    """|round(W + D) - round(W) - D| / |D| over all updates D = scale B A together, in Frobenius' norm.

    It compares the merged model with the base and the adapter apart, both in `dtype`. One matrix is in memory at a
    time. 0 where every update is 0.
    """
    lost = whole = 0.0
    for weight, update in _iter_updates(source, model, finetune):
        merged = (weight + update).to(dtype).double() - weight.to(dtype).double()
        lost += float((merged - update.double()).square().sum())
        whole += float(update.double().square().sum())
    return math.sqrt(lost / whole) if whole else 0.0


def _iter_updates(
    source: FragmentSource, model: ModelConfig, finetune: FinetuneConfig
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each matrix of the base that has an update, of experts one after the other, and the update, in fp32."""
    declared = declare_parameters(model, finetune)
    for name, a in declared.items():
        if not name.endswith("lora_a"):
            continue
        b, stem = declared[f"{name.removesuffix('a')}b"], name[: -len(".lora_a")]
        weight = declared[stem if a.expert else f"{stem}.weight"]
        for expert in range(weight.shape[0]) if a.expert else (None,):
            whole = [Box.whole(each.shape) for each in (weight, a, b)]
            boxes = whole if expert is None else [Box((expert, 0, 0), (1, *box.shape[1:])) for box in whole]
            base, low, high = (
                source.read(each.name, "master", box).float().reshape(each.shape[-2:])
                for each, box in zip((weight, a, b), boxes, strict=True)
            )
            yield base, finetune.lora.scale * (high @ low)
