"""One process that has imported everything and runs the command in forked children, one after the other.

A new interpreter per command line would spend seconds on imports. Requests and answers are lines of JSON. A child that
needs more processor time or memory than it is given is ended by the system.
"""

import ctypes
import importlib
import json
import os
import pkgutil
import resource
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, NoReturn

ROOMS = ("llmtrain.cli", "llmtrain.train", "llmtrain.observe", "llmtrain.infer", "llmtrain.interop", "data_pipelines")
MORE = (
    "launch.on_slurm.batch_script",
    "launch.on_ray.jobs",
    "launch.rank.worker",
    "launch.local",
    "transformers",
    "torch._dynamo",
)
UNDER_TEST = "wandb_tracker", "tensorboard_tracker"
CAPABILITY_VERSION = 0x20080522
OVERRIDING_CAPABILITIES = 0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH


def import_everything() -> None:
    for room in ROOMS:
        for found in pkgutil.iter_modules(importlib.import_module(room).__path__, f"{room}."):
            if not found.name.endswith(UNDER_TEST):
                importlib.import_module(found.name)
    for name in MORE:
        importlib.import_module(name)


def obey_permissions() -> None:
    """A superuser may open everything; without these capabilities permissions hold for the files of root too."""
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    data = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None)
    if libc.capget(header, data) == 0:
        data[0] &= ~OVERRIDING_CAPABILITIES
        libc.capset(header, data)


def limit(cpu_seconds: int, more_bytes: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    # What has been used so far counts: a forked process begins at 0.
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def be_the_command(request: dict[str, Any]) -> NoReturn:
    code = 70
    try:
        os.setsid()
        os.chdir(request["folder"])
        output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        obey_permissions()
        limit(request["cpu_seconds"], request["more_bytes"])
        from llmtrain.cli import main

        sys.argv = ["llmtrain", *request["arguments"]]
        main(request["arguments"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(request: dict[str, Any]) -> dict[str, Any]:
    child = os.fork()
    if child == 0:
        be_the_command(request)
    timer = threading.Timer(request["seconds"], os.kill, (child, signal.SIGKILL))
    timer.start()
    _, status, used = os.wait4(child, 0)
    timer.cancel()
    seconds = used.ru_utime + used.ru_stime
    return {"code": os.waitstatus_to_exitcode(status), "cpu_seconds": seconds, "size_kilobytes": used.ru_maxrss}


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import_everything()
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        answers.write(json.dumps(run(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
