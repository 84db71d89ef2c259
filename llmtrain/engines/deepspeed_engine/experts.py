"""Expert parallelism under DeepSpeed: our groups and parameters under the names that it looks for."""

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups as deepspeed_groups
from torch import nn

from llmtrain.parallel.groups import Groups


class Marker(MoE):
    """By a module of this class DeepSpeed knows that a model has experts. It computes nothing."""

    def __init__(self, num_experts: int) -> None:
        nn.Module.__init__(self)
        self.num_experts = num_experts

    def set_deepspeed_parallelism(self, *_: Any, **__: Any) -> None:
        """The groups are made already."""


def group_name(groups: Groups) -> str:
    """The only form of name that DeepSpeed understands."""
    return f"ep_size_{groups.layout.expert}"


def register_experts(stage: nn.Module, num_experts: int, groups: Groups) -> None:
    """Let DeepSpeed find experts that are spread over ranks, and their groups. Call before its engine is made."""
    name = group_name(groups)
    known: Any = deepspeed_groups
    for group, registry in (
        (groups.expert, ("_EXPERT_PARALLEL_GROUP", "_EXPERT_PARALLEL_GROUP_RANKS")),
        (groups.expert_data, ("_EXPERT_DATA_PARALLEL_GROUP", "_EXPERT_DATA_PARALLEL_GROUP_RANKS")),
    ):
        getattr(known, registry[0])[name] = group
        getattr(known, registry[1])[name] = dist.get_process_group_ranks(group)
    stage.add_module("expert_marker", Marker(num_experts))


def expert_group(parameters: Iterable[nn.Parameter], weight_decay: float, groups: Groups) -> dict[str, Any]:
    """The optimizer group of experts, which are sharded over the ranks that hold the same ones."""
    name, parameters = group_name(groups), list(parameters)
    for parameter in parameters:
        parameter.group_name = name  # type: ignore[attr-defined]  # read by DeepSpeed under this name
    return {"params": parameters, "weight_decay": weight_decay, "name": name, "moe": True}
