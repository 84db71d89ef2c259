"""The engines and their abilities: one row each, which rules, launchers, checks and advice read. Pure."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

EngineName = Literal["torch", "megatron", "deepspeed"]
DEFAULT_ENGINE: EngineName = "torch"


@dataclass(frozen=True)
class EngineRow:
    """One engine."""

    module: str
    """The module of its class. It is imported only where the engine is in use: that takes seconds."""
    class_name: str
    """The class, made from (config, device)."""
    axes: tuple[str, ...] = ()
    """Keys of `parallel` that may be more than 1. Every engine splits the batch."""
    zero_stages: tuple[int, ...] = (0,)
    offloads: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Values of `engine.offload` beside none, each with the ZeRO stages that it goes with."""
    optimizers: tuple[str, ...] = ("adamw", "lion")
    """Values of `optim.name`."""
    needs_group: bool = True
    """It needs a process group even where there is one rank only."""
    platforms: tuple[str, ...] = ()
    """Values of `sys.platform` that its package is made for; empty: all."""
    no_compile: str = ""
    """Why `train.compile` is not possible; empty: it is."""
    gpu_fp16_stages: tuple[int, ...] = ()
    """ZeRO stages whose fp16 needs a GPU."""
    no_overlap_stages: tuple[int, ...] = ()
    """ZeRO stages whose gradients are summed after the backward pass alone."""
    no_fp8_stages: tuple[int, ...] = ()
    """ZeRO stages that gather weights for a product which, in float8, keeps what it was given."""
    whole_expert_stages: tuple[int, ...] = ()
    """ZeRO stages that cannot be with experts that are spread over ranks."""

    def compiles(self, tensor: int) -> bool:
        """True where layers can be compiled with so many tensor ranks, which bring linears that are not torch's."""
        return not self.no_compile and ("tensor" not in self.axes or tensor == 1)


ENGINES: dict[str, EngineRow] = {
    "torch": EngineRow(
        module="llmtrain.engines.torch_engine",
        class_name="TorchEngine",
        needs_group=False,
    ),
    "megatron": EngineRow(
        module="llmtrain.engines.megatron_engine",
        class_name="MegatronEngine",
        axes=("tensor", "pipeline", "context", "expert"),
        zero_stages=(0, 1),
        platforms=("linux",),
    ),
    "deepspeed": EngineRow(
        module="llmtrain.engines.deepspeed_engine",
        class_name="DeepSpeedEngine",
        axes=("tensor", "context", "expert"),
        zero_stages=(0, 1, 2, 3),
        offloads={"cpu": (1, 2, 3), "nvme": (3,)},
        platforms=("linux",),
        no_compile="ZeRO's hooks inside of layers are not compiled",
        gpu_fp16_stages=(1, 2, 3),
        no_overlap_stages=(0,),
        no_fp8_stages=(3,),
        whole_expert_stages=(3,),
    ),
}
"""By `engine.name`, in the order in which they are suggested."""


def engines_that(can: Callable[[EngineRow], bool]) -> list[str]:
    """Names of the engines that can do something, by their row."""
    return [name for name, row in ENGINES.items() if can(row)]
