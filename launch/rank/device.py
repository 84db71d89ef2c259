"""The device of a rank: which one it is, and how PyTorch is to use it; and the threads that compute on a CPU."""

import gc
import os
import socket
import threading
from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack, contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from launch.rank.place import Rank
from llmtrain.config.launch import LaunchConfig
from llmtrain.config.schema import RunConfig
from llmtrain.errors import ConfigError, Problem

ATTENTION_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""The fastest first, by what is published of H100: cuDNN's is written for it, PyTorch's flash attention for A100."""

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The allocator's settings; the second name is that of PyTorch before 2.10, which later ones read too."""


def choose_device(config: LaunchConfig, place: Rank) -> torch.device:
    """The device of this rank. Raises ConfigError where a GPU is asked for and absent, or ranks outnumber GPUs."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "launch.device = cuda: PyTorch finds no GPU here. Set launch.device=cpu, or check `nvidia-smi`."
        )
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if place.device is not None:
        return torch.device("cuda", place.device)
    if place.local_world_size > torch.cuda.device_count():
        raise ConfigError(
            f"launch.num_workers: {place.local_world_size} ranks on {socket.gethostname()}, which has "
            f"{torch.cuda.device_count()} GPUs. Start as many ranks as there are GPUs, or set launch.device=cpu."
        )
    return torch.device("cuda", place.local_rank)


def start_threads(number: int) -> None:
    """Let PyTorch compute with so many threads, which take their memory at once. Raises ConfigError where that leaves
    this process no room for one of Python's."""
    torch.set_num_threads(number)
    try:
        trial = threading.Thread(target=int)
        trial.start()
        trial.join()
    except RuntimeError as error:
        message = (
            f"takes all threads or all memory that this process may have ({error}). Try {os.cpu_count() or 1}, or "
            "raise the limits (ulimit -u, ulimit -v)."
        )
        raise ConfigError([Problem("launch.threads_per_worker", message, number)]) from error


def set_variables(config: RunConfig, device: torch.device, environment: MutableMapping[str, str]) -> None:
    """Set what CUDA and the allocator read when they are used first. What the user has set stays."""
    if device.type != "cuda":
        return
    if not any(name in environment for name in ALLOCATOR_VARIABLES):
        # Sizes change between training, evaluation and saving: segments that grow are not left in pieces.
        environment[ALLOCATOR_VARIABLES[1]] = "expandable_segments:True"
    if config.parallel.tensor > 1:
        # With one queue to the device, a collective starts in the order of its launch, and is not held up by kernels
        # that were launched after it.
        environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if config.train.deterministic:
        # cuBLAS chooses among workspaces as streams come by; with one of a fixed size it sums in one order.
        environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"


@contextmanager
def settled(config: RunConfig, device: torch.device) -> Iterator[None]:
    """PyTorch set to this device for a run, and the garbage collector left to the engines' steps.

    Enter before the device is used.
    """
    set_variables(config, device, os.environ)
    with ExitStack() as held:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # libraries allocate on the current device
            held.enter_context(sdpa_kernel(ATTENTION_BACKENDS, set_priority=True))
            # Kernels that add up in the order in which their parts are done, as the backward passes of attention do,
            # give way to others; what has no other raises an error.
            held.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
            torch.use_deterministic_algorithms(config.train.deterministic)
        gc.disable()
        held.callback(gc.enable)
        yield
