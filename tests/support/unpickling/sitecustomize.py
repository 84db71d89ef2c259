"""Every attempt to unpickle in a process and its children is noted, and refused unless it is known to be harmless.

Python imports this file at its start where the folder is on PYTHONPATH. What is refused raises; since somebody may
catch that, it is also written, with its callers, to the file that UNPICKLING_LOG names.

Refused are always: torch.load and its unpickler, and pickle.load, pickle.loads and pickle.Unpickler on whatever lies on
a disk or is asked for by a caller that ALLOWED does not name. Whoever holds on to the C functions in another way is
seen by the interpreter's own audit of every class that an unpickler looks up.

Allowed is what a process tells itself or its own children, in memory:
"""

import _pickle
import io
import os
import pickle
import sys
import threading
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import PathFinder
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

LOG = os.environ.get("UNPICKLING_LOG", "")

ALLOWED = {
    "torch.distributed.distributed_c10d._tensor_to_object": (
        "all_gather_object, by which megatron-core's ranks tell each other at set-up what parameter groups they have: "
        "bytes that another rank of the same run has just pickled, in memory"
    ),
}
"""The one function that calls an unpickler: why it cannot get what lies on a disk."""

_judged = threading.local()
_original_load, _original_loads, _OriginalUnpickler = _pickle.load, _pickle.loads, _pickle.Unpickler


class UnpicklingRefused(RuntimeError):
    """Something was about to be unpickled."""


def refuse(what: str, frame: FrameType | None) -> None:
    """Note who asks, and raise."""
    callers = []
    while frame is not None:
        callers.append(f"{frame.f_globals.get('__name__')}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    with Path(LOG).open("a", encoding="utf-8") as log:
        log.write(f"{what} by {' < '.join(callers)}\n")
    raise UnpicklingRefused(what)


def judge(what: str, file: Any = None) -> None:
    """Refuse unless the caller of the function that asks is allowed to, and nothing on a disk is read."""
    frame = sys._getframe(2)
    if file is not None and not isinstance(file, io.BytesIO):
        refuse(f"{what} of {file!r}", frame)
    if f"{frame.f_globals.get('__name__')}.{frame.f_code.co_name}" not in ALLOWED:
        refuse(what, frame)


class judged:
    """While it is entered, classes may be looked up: this unpickling has been judged."""

    def __enter__(self) -> None:
        _judged.depth = getattr(_judged, "depth", 0) + 1

    def __exit__(self, *_: object) -> None:
        _judged.depth -= 1


def load(file: Any, **settings: Any) -> Any:
    judge("pickle.load", file)
    with judged():
        return _original_load(file, **settings)


def loads(data: Any, /, **settings: Any) -> Any:
    judge("pickle.loads")
    with judged():
        return _original_loads(data, **settings)


class Unpickler(_OriginalUnpickler):
    """Asks when it is made, where the file is seen, and again when it is used."""

    def __init__(self, file: Any, **settings: Any) -> None:
        judge("pickle.Unpickler", file)
        super().__init__(file, **settings)

    def load(self) -> Any:
        judge("pickle.Unpickler.load")
        with judged():
            return super().load()


def audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "pickle.find_class" and not getattr(_judged, "depth", 0):
        refuse(f"a lookup of {'.'.join(map(str, arguments))} past the replaced functions", sys._getframe(1))


def torch_load(*arguments: Any, **settings: Any) -> None:
    refuse(f"torch.load of {arguments[:1]}", sys._getframe(1))


class Replacing(Loader):
    """Loads a module as ever, then replaces functions in it."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: Any) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        module.load = torch_load


class Finder(MetaPathFinder):
    """Finds the modules from which PyTorch takes its loading functions."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in ("torch.serialization", "torch._weights_only_unpickler"):
            return None
        spec = PathFinder.find_spec(name, path, target)
        assert spec is not None and spec.loader is not None
        spec.loader = Replacing(spec.loader)
        return spec


if LOG:
    for module in (pickle, _pickle):
        module.load, module.loads, module.Unpickler = load, loads, Unpickler
    pickle._load, pickle._loads, pickle._Unpickler = load, loads, Unpickler
    sys.meta_path.insert(0, Finder())
    sys.addaudithook(audit)
