"""megatron-core without a GPU: stand-ins for the CUDA names that it uses.

megatron-core names CUDA directly, where a tensor's own device would do. Where there is no CUDA, its modules see, under
the name `torch`, the object below: torch in all but these names. Nothing in torch itself is replaced, and where CUDA is
there nothing is replaced at all. The numbers are those of the same code on CPU tensors.
"""

import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

CPU = torch.device("cpu")


def nothing(*_: Any, **__: Any) -> None:
    """In place of a call that orders work on a device: on the CPU work is done when the call returns."""


def zero(*_: Any, **__: Any) -> int:
    """In place of a call that asks how much device memory is in use."""
    return 0


class CpuStream:
    """A stream on which everything is done at once."""

    wait_stream = wait_event = synchronize = record_event = nothing


def stream(*_: Any, **__: Any) -> CpuStream:
    return CpuStream()


CUDA_NAMES: dict[str, Callable[..., Any]] = {
    "current_device": lambda: CPU,
    "set_device": nothing,
    "synchronize": nothing,
    "empty_cache": nothing,
    "manual_seed": nothing,
    "current_stream": stream,
    "default_stream": stream,
    "Stream": stream,
    "stream": lambda *_: nullcontext(),
    "memory_allocated": zero,
    "max_memory_allocated": zero,
    "is_current_stream_capturing": lambda: False,
    "get_rng_state": torch.get_rng_state,
    "set_rng_state": nothing,
}
"""Functions of torch.cuda, and what megatron-core calls instead. Its random states are never drawn from: our draws are
hashes, our weights are drawn by models/init.py."""

FACTORIES = ("tensor", "zeros", "ones", "empty", "full")
"""Functions of torch that make tensors: device="cuda" means the CPU."""


class CudaStandIn:
    """`torch.cuda` as megatron-core sees it: the names above, and the real module's otherwise."""

    def __getattr__(self, name: str) -> Any:
        return CUDA_NAMES.get(name) or getattr(torch.cuda, name)


class TorchStandIn:
    """`torch` as megatron-core sees it."""

    cuda = CudaStandIn()

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        return on_cpu(found) if name in FACTORIES else found


def on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """The factory, with "cuda" read as the CPU."""

    def make(*args: Any, **options: Any) -> Any:
        device = options.get("device")
        return factory(*args, **{**options, "device": CPU} if device == "cuda" else options)

    return make


def stand_in_for_cuda() -> None:
    """Let megatron-core's modules, all that are loaded by now, run on the CPU. Does nothing where CUDA is there."""
    if torch.cuda.is_available():
        return
    stand_in = TorchStandIn()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = stand_in  # type: ignore[attr-defined]


def call_cuda_tensors(parameters: Iterable[nn.Parameter]) -> None:
    """Let parameters on the CPU give the type name of their CUDA kin: the optimizers sort parameters by that name."""
    if torch.cuda.is_available():
        return
    for parameter in parameters:
        name = parameter.type().replace("torch.", "torch.cuda.")
        # On the instance, with the name bound now: the loop's variable will be another parameter's.
        parameter.type = lambda name=name: name  # type: ignore[method-assign]
