"""DeepSpeed's configuration and its engine, made from ours. All of its configuration keys stand in this file."""

import io
import os
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups as deepspeed_groups
from torch import nn
from torch.distributed import ProcessGroup

from llmtrain.config.schema import RunConfig
from llmtrain.errors import LaunchError
from llmtrain.parallel.groups import Groups
from llmtrain.values.precision import DTYPES

BUCKET_ELEMENTS = 1 << 24
"""Gradients, or weights, that go over the network in one collective."""

WHOLE_ELEMENTS = 100_000
"""Parameters up to this size stay whole on every rank in stage 3: norms and biases are not worth a gather."""


@dataclass(frozen=True)
class Mpu:
    """Our groups under the names that DeepSpeed asks a model-parallel unit for. Its data-parallel ranks are all that
    hold the same part of the model: ours of the data and of the context axis."""

    groups: Groups

    def get_model_parallel_group(self) -> ProcessGroup:
        return self.groups.tensor

    def get_model_parallel_rank(self) -> int:
        return self.groups.tensor.rank()

    def get_model_parallel_world_size(self) -> int:
        return self.groups.tensor.size()

    def get_data_parallel_group(self) -> ProcessGroup:
        return self.groups.data_context

    def get_data_parallel_rank(self) -> int:
        return self.groups.data_context.rank()

    def get_data_parallel_world_size(self) -> int:
        return self.groups.data_context.size()

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.groups.data_context)


def materialize_partitioned(module: nn.Module, config: RunConfig, groups: Groups, device: torch.device) -> None:
    """Give a meta module memory for stage 3: part after part, each partitioned at once, so that it is never whole."""
    partition = deepspeed.zero.Init(
        data_parallel_group=groups.data_context,
        config_dict_or_path=deepspeed_config(config, device),
        dtype=DTYPES[config.train.precision],
        mpu=Mpu(groups),
    )
    for part in module.modules():
        part.to_empty(device=device, recurse=False)
        # Private: the public way is to build the model inside of this context, with memory from the start.
        partition._convert_to_zero_parameters(part.parameters(recurse=False))


def build_deepspeed(
    config: RunConfig, module: nn.Module, optimizer: torch.optim.Optimizer, groups: Groups, device: torch.device
) -> Any:
    """DeepSpeed's engine around a stage and a torch optimizer; it replaces the optimizer's parameters by its own."""
    with redirect_stdout(io.StringIO()):  # it reports memory as it goes
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=deepspeed_config(config, device), mpu=Mpu(groups)
        )
    return engine


def prepare_deepspeed(config: RunConfig, device: torch.device) -> None:
    """Set what DeepSpeed reads from its surroundings.

    Raises LaunchError where it cannot run on the device, or NVMe offload not on this machine.
    """
    accelerator: Any = get_accelerator()
    if accelerator.device_name() != device.type:
        raise LaunchError(
            f"engine.name = deepspeed: uses the {accelerator.device_name()} that is there, not launch.device = "
            f"{device.type}. Set launch.device=auto, or hide the GPUs with CUDA_VISIBLE_DEVICES= before llmtrain."
        )
    if config.engine.offload == "nvme" and not can_offload_to_nvme():
        raise LaunchError(
            "engine.offload = nvme: needs libaio and its headers, which are not on this machine. "
            "Install them (Debian: apt-get install libaio-dev), or set engine.offload=cpu."
        )
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # it sets its device by this variable alone
    # A kernel for inference on CPUs, which DeepSpeed would compile at every first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()  # takes over the group that torch.distributed has; its own calls go through it


def can_offload_to_nvme() -> bool:
    """True where DeepSpeed's asynchronous reads and writes can be compiled."""
    accelerator: Any = get_accelerator()
    return accelerator.create_op_builder("AsyncIOBuilder").is_compatible(verbose=False)


def deepspeed_config(config: RunConfig, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's own configuration.

    The step is decided by SteppingEngine, so DeepSpeed decides nothing: its loss scale is 1, it neither clips nor
    divides by the number of micro-batches. Gradients are accumulated and reduced in fp32.
    """
    keys: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,  # any that steps each element by itself: tests/parity/test_optimizers.py
        "zero_optimization": zero_keys(config, device),
    }
    if config.engine.zero_stage < 3:
        keys["gradient_allreduce_op"] = "sum"
    if config.engine.zero_stage > 0 and DTYPES[config.train.precision] == torch.bfloat16:
        keys["bf16"] = {"enabled": True, "immediate_grad_update": True, "check_grad_overflow": False}
    if config.engine.zero_stage > 0 and config.train.precision == "fp16":
        keys["fp16"] = {"enabled": True, "loss_scale": 1.0}
    return keys


def zero_keys(config: RunConfig, device: torch.device) -> dict[str, Any]:
    """The section about ZeRO and offload."""
    overlap = config.parallel.overlap_grad_reduce
    keys: dict[str, Any] = {
        "stage": config.engine.zero_stage,
        "overlap_comm": device.type == "cuda" if overlap is None else overlap,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
        "stage3_prefetch_bucket_size": BUCKET_ELEMENTS,
        "stage3_param_persistence_threshold": WHOLE_ELEMENTS,
    }
    if computes_no_norm(config):
        keys["compute_grad_norm"] = False
    pinned = device.type == "cuda"
    if config.engine.offload == "cpu":
        keys["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
    elif config.engine.offload == "nvme":
        assert config.engine.nvme_path is not None, "config/rules/engine.py: offload_has_a_place"
        folder = Path(config.engine.nvme_path) / config.name  # runs at the same time have files of the same names
        keys["offload_optimizer"] = {"device": "nvme", "pin_memory": pinned, "nvme_path": str(folder)}
    return keys


def computes_no_norm(config: RunConfig) -> bool:
    """True where DeepSpeed can be kept from computing a norm of its own, which nobody reads.

    It insists on one under offload, in stage 3, and in its optimizer for bf16 in stage 1.
    """
    engine = config.engine
    bf16_optimizer = engine.zero_stage == 1 and DTYPES[config.train.precision] == torch.bfloat16
    return engine.zero_stage in (1, 2) and engine.offload == "none" and not bf16_optimizer


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


def register_experts(stage: nn.Module, experts: Sequence[nn.Parameter], num_experts: int, groups: Groups) -> None:
    """Let DeepSpeed find experts that are spread over ranks, trained or not, and their groups. Call before its engine
    is made."""
    name = group_name(groups)
    for parameter in experts:
        parameter.group_name = name  # type: ignore[attr-defined]  # read by DeepSpeed under this name
    # Private registries: no public call takes groups of experts that are made already.
    known: Any = deepspeed_groups
    for group, registry in (
        (groups.expert, ("_EXPERT_PARALLEL_GROUP", "_EXPERT_PARALLEL_GROUP_RANKS")),
        (groups.expert_data, ("_EXPERT_DATA_PARALLEL_GROUP", "_EXPERT_DATA_PARALLEL_GROUP_RANKS")),
    ):
        getattr(known, registry[0])[name] = group
        getattr(known, registry[1])[name] = dist.get_process_group_ranks(group)
    if any(parameter.requires_grad for parameter in experts):  # where none is trained, its optimizers want none
        stage.add_module("expert_marker", Marker(num_experts))


def expert_group(parameters: Iterable[nn.Parameter], weight_decay: float, groups: Groups) -> dict[str, Any]:
    """The optimizer group of experts, which are sharded over the ranks that hold the same ones."""
    return {"params": list(parameters), "weight_decay": weight_decay, "name": group_name(groups), "moe": True}
