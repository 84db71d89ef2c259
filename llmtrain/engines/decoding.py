"""One rank's part of a trained model for decoding: cut and split as an engine's stage, filled from any source.

A checkpoint of whatever layout will do, and a Hugging Face folder: each rank reads the boxes that it holds.
"""

from collections.abc import Sequence

import torch

from llmtrain.engines.masters import read_range
from llmtrain.engines.part import ModelPart
from llmtrain.infer.model import FoundModel, load_router_biases
from llmtrain.models.transformer import Transformer, build_model
from llmtrain.parallel.cpu import stand_in_for_cuda
from llmtrain.parallel.groups import Groups, build_groups
from llmtrain.parallel.layout import Layout, plan_chunks
from llmtrain.parallel.tensor import TensorRegion


def decoding_groups(layout: Layout) -> Groups:
    """The groups of a layout; torch.distributed is initialized with as many ranks as it has."""
    stand_in_for_cuda()  # before the groups: building them calls torch.cuda
    return build_groups(layout)


@torch.no_grad()
def load_part(found: FoundModel, groups: Groups, split: Sequence[int] | None, device: torch.device) -> Transformer:
    """This rank's part in fp32, in evaluation mode; `split` as in `plan_chunks`. Raises CheckpointError where the
    weights do not fit."""
    (chunk,) = plan_chunks(groups.layout, found.config.total_layers, split, groups.place.pipeline)
    model = build_model(found.config)
    region = TensorRegion(groups.tensor, sequence=False) if groups.layout.tensor > 1 else None
    part = ModelPart(model, found.finetune, groups, chunk, region)
    model.to_empty(device=device)
    for parameter, placement in part.named_placements():
        read_range(found.weights, placement, "master", (0, parameter.numel()), parameter.detach().view(-1))
    load_router_biases(model, found.weights, device)
    return model.eval()
