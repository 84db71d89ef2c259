"""One process that has imported everything and runs the command in forked children, one after the other.

A new interpreter per command line would spend seconds on imports, and its end, which takes all modules apart, half a
second. Requests and answers are lines of JSON.
"""

import atexit
import importlib
import json
import os
import pkgutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
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

Prepare = Callable[[dict[str, Any]], object]
"""What a child does before it is the command, by its request."""


def import_everything() -> None:
    for room in ROOMS:
        for found in pkgutil.iter_modules(importlib.import_module(room).__path__, f"{room}."):
            if not found.name.endswith(UNDER_TEST):
                importlib.import_module(found.name)
    for name in MORE:
        importlib.import_module(name)


def be_the_command(request: dict[str, Any], prepare: Prepare) -> NoReturn:
    """End as an interpreter ends, but for what it does to modules and the memory."""
    code = 1
    try:
        start_command(request, prepare)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start_command(request: dict[str, Any], prepare: Prepare) -> NoReturn:
    os.chdir(request["folder"])
    for target, (path, flags) in enumerate(
        ((os.devnull, os.O_RDONLY), *((request[name], os.O_WRONLY | os.O_CREAT) for name in ("stdout", "stderr")))
    ):
        opened = os.open(path, flags | os.O_APPEND, 0o600)
        os.dup2(opened, target)
        os.close(opened)
    prepare(request)
    # multiprocessing would import the module that is run here.
    sys.modules["__main__"] = ModuleType("__main__")
    sys.path[0] = str(Path(sys.executable).parent)
    sys.argv = ["llmtrain", *request["arguments"]]
    from llmtrain.cli import main

    main()


def run(request: dict[str, Any], prepare: Prepare) -> dict[str, Any]:
    child = os.fork()
    if child == 0:
        be_the_command(request, prepare)
    timer = threading.Timer(request["seconds"], os.kill, (child, signal.SIGKILL))
    timer.start()
    _, status, used = os.wait4(child, 0)
    timer.cancel()
    seconds = used.ru_utime + used.ru_stime
    return {"code": os.waitstatus_to_exitcode(status), "cpu_seconds": seconds, "size_kilobytes": used.ru_maxrss}


def serve(prepare: Prepare) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import_everything()
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        answers.write(json.dumps(run(json.loads(line), prepare)) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(lambda request: None)
