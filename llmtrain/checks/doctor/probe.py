"""`python -P -m llmtrain.checks.doctor.probe NAME [ARGUMENT ...]`: try one thing, in a process that may break.

Prints the result as JSON, or `error` in words; several trials print a line each. What libraries print goes to stderr.
"""

import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from launch.forking.rank_process import die_with
from llmtrain.config.engines import ENGINES
from llmtrain.interop.installation import broken_package

PRECISIONS = ("fp32", "bf16", "fp16", "fp8")
ZERO_STAGES = (0, 1, 2, 3)
AXES = ("tensor", "pipeline", "context")
MEETING_SECONDS = 30.0
CHILD_SECONDS = 150

Answer = dict[str, Any]
"""The answer of a probe, as JSON."""


def imports(*names: str) -> Answer:
    """Imports each of these packages: None where that works, else the error in words.

    Where another package fails in it, `NAME breaks in` says which.
    """
    answers: dict[str, Any] = {}
    for name in names:
        broken: list[str | None] = []
        answers[name] = error_of(lambda name=name, broken=broken: _import(name, broken))
        answers |= {f"{name} breaks in": package for package in broken if package not in (None, name.split(".")[0])}
    return answers


def _import(name: str, broken: list[str | None]) -> None:
    try:
        import_module(name)
    except Exception as error:
        broken.append(broken_package(error))
        raise


def trials(*engines: str) -> Iterator[Answer]:
    """The answers of `devices`, `meeting` and `engine`, by name, from processes that share the imports."""
    yield {"devices": devices()}
    children = {"meeting": start_child(lambda: meeting("cpu"))}
    # What a rank imports, so that a package that training needs is missed here.
    error = error_of(lambda: import_module("launch.rank.worker"))
    for name in engines:
        if error is None:
            children[f"engine {name}"] = start_child(lambda name=name: engine(name))
        else:
            yield {f"engine {name}": {"error": error}}
    for name, child in children.items():
        yield {name: finish(child)}


def devices() -> Answer:
    """The devices that PyTorch sees. No GPU is initialized by it, so that forked processes can use it."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch
    import torch.distributed as dist

    return {
        "torch": torch.__version__,
        "cuda_build": torch.version.cuda,
        "gpus": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "gloo": dist.is_gloo_available(),
        "nccl": dist.is_nccl_available(),
    }


def meeting(kind: str) -> Answer:
    """Two ranks meet on this machine and add up a number, on CPUs (`cpu`) or on two GPUs (`cuda`)."""
    from launch.rank.rendezvous import serve_store

    listener = socket.create_server(("127.0.0.1", 0))
    host, port = listener.getsockname()
    ranks = [start_child(lambda rank=rank: _rank_of_two(rank, host, port, kind)) for rank in range(2)]
    store = serve_store(listener)
    errors = [answer["error"] for answer in map(finish, ranks) if "error" in answer]
    del store
    return {"error": errors[0]} if errors else {}


def engine(name: str) -> Answer:
    """One tiny step with each precision, ZeRO stage and offload that the rules allow; what they forbid, and why."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    from launch.rank.device import choose_device
    from launch.rank.place import ALONE
    from llmtrain.config.launch import LaunchConfig
    from llmtrain.train.setup import engine_class

    device = choose_device(LaunchConfig(), ALONE)
    build = engine_class(name)
    worked, failed, refused = [], {}, {}
    answers: dict[Any, Answer] = {}
    for title, changes in _trials(name):
        config = _config(name, device.type, changes)
        problem = _refusal(config)
        if problem:
            refused[title] = problem
            continue
        if config not in answers:
            # Engines keep what cannot be made twice in a process.
            answers[config] = finish(start_child(lambda config=config: _one_step(build, config, device)))
        if "error" in answers[config]:
            failed[title] = answers[config]["error"]
        else:
            worked.append(title)
    axes = [axis for axis in AXES if not _refusal(_config(name, device.type, {"parallel": {axis: 2}}, workers=2))]
    return {"device": device.type, "worked": worked, "failed": failed, "refused": refused, "axes": axes}


def _trials(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for precision in PRECISIONS:
        # Without ZeRO, deepspeed's fp16 is not in use.
        stage = min(ENGINES[name].gpu_fp16_stages, default=0)
        yield precision, {"train": {"precision": precision}, "engine": {"zero_stage": stage}}
    for stage in ZERO_STAGES:
        yield f"ZeRO {stage}", {"engine": {"zero_stage": stage}}
    yield "offload to cpu", {"engine": {"zero_stage": 2, "offload": "cpu"}}


def _config(name: str, device: str, changes: dict[str, Any], workers: int = 1) -> Any:
    from llmtrain.config.schema import RunConfig

    train = {"steps": 2, "global_batch_size": 2, "micro_batch_size": 1, **changes.get("train", {})}
    return RunConfig.model_validate(
        {
            "name": "doctor",
            "model": {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "vocab_size": 128, "max_seq_len": 16},
            "data": {"train": [{"path": "none"}], "seq_len": 16},
            "train": train,
            "engine": {"name": name, **changes.get("engine", {})},
            "parallel": changes.get("parallel", {}),
            "launch": {"device": device, "num_workers": workers},
        }
    )


def _refusal(config: Any) -> str | None:
    """Why the rules do not allow a configuration."""
    from llmtrain.config.rules.engine import ENGINE_RULES
    from llmtrain.config.rules.precision import PRECISION_RULES

    return next((problem.message for rule in (*ENGINE_RULES, *PRECISION_RULES) for problem in rule(config)), None)


def _one_step(build: Callable[..., Any], config: Any, device: Any) -> Answer:
    import torch

    from launch.rank.place import ALONE
    from launch.rank.rendezvous import lone_store, open_group
    from llmtrain.models.float8 import require_float8
    from llmtrain.values.batch import Batch

    if config.train.precision == "fp8":
        require_float8(device)
    if ENGINES[config.engine.name].needs_group:
        open_group(lone_store(), ALONE, device, MEETING_SECONDS)
    tokens = torch.arange(config.data.seq_len + 1).expand(1, -1)
    positions = torch.arange(config.data.seq_len).expand(1, -1)
    batches = [
        Batch(tokens[:, :-1], positions, labels_BS=tokens[:, 1:].clone(), first_sample=number) for number in range(2)
    ]
    loss = build(config, device).train_step(1, batches, config.optim.lr).loss
    if not 0.0 < loss < 100.0:
        raise ArithmeticError(f"the loss of a step is {loss}")
    return {}


def _rank_of_two(rank: int, host: str, port: int, kind: str) -> Answer:
    import torch
    import torch.distributed as dist

    from launch.rank.place import Rank
    from launch.rank.rendezvous import connect, open_group

    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    place = Rank(rank, 2, rank, 2, host, port)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device("cpu")
    open_group(connect(place, MEETING_SECONDS), place, device, MEETING_SECONDS)
    number = torch.tensor([rank + 1.0], device=device)
    # The one collective of the probe; its result is waited for, because on a GPU its error comes no earlier.
    dist.all_reduce(number)
    if number.item() != 3.0:
        raise ArithmeticError(f"1 and 2 were added up to {number.item()}")
    return {}


@dataclass(frozen=True)
class Child:
    """A forked process, and where its answer comes from."""

    process: int
    answer: int


def start_child(work: Callable[[], Answer]) -> Child:
    """Do something in a forked process, which is ended after CHILD_SECONDS."""
    read, write = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if child:
        os.close(write)
        return Child(child, read)
    die_with(parent)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(CHILD_SECONDS)
    os.write(write, json.dumps(answer_of(work)).encode())
    # Libraries' threads and process groups must not keep or break the end.
    os._exit(0)


def finish(child: Child) -> Answer:
    """Wait for the answer of a forked process."""
    with os.fdopen(child.answer, "rb") as pipe:
        said = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child.process, 0)[1])
    if code == -signal.SIGALRM:
        return {"error": f"no end within {CHILD_SECONDS} s"}
    return json.loads(said) if code == 0 else {"error": f"the process ended with {code}"}


def answer_of(work: Callable[[], Answer]) -> Answer:
    """The answer of some work, or its error."""
    answer: Answer = {}
    error = error_of(lambda: answer.update(work()))
    return answer if error is None else {"error": error}


def error_of(action: Callable[[], object]) -> str | None:
    """The error of an action in one line; a traceback goes to stderr."""
    try:
        action()
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        return " ".join(f"{type(error).__name__}: {error}".split())
    return None


PROBES: dict[str, Callable[..., Answer | Iterator[Answer]]] = {
    "imports": imports,
    "trials": trials,
    "devices": devices,
    "meeting": meeting,
    "engine": engine,
}


def main(arguments: list[str]) -> None:
    """Run a probe, and end with 1 where it came to an error. Whoever has asked is gone: so is the probe."""
    output = os.dup(1)
    os.dup2(2, 1)  # libraries print to stdout, where answers are expected
    die_with(os.getppid())

    def say() -> None:
        said = PROBES[arguments[0]](*arguments[1:])
        for part in [said] if isinstance(said, dict) else said:
            os.write(output, json.dumps(part).encode() + b"\n")

    error = error_of(say)
    if error is not None:
        os.write(output, json.dumps({"error": error}).encode() + b"\n")
    sys.stdout.flush()
    sys.stderr.flush()
    # The answer is out: threads and exit handlers of the libraries that were tried cannot change the exit code.
    os._exit(0 if error is None else 1)


if __name__ == "__main__":
    main(sys.argv[1:])
