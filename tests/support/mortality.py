"""Processes that die at a chosen moment: at the n-th file operation of what they do."""

import itertools
import os
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch

FILE_OPERATIONS = (
    "open",
    "write",
    "pwrite",
    "writev",
    "fsync",
    "rename",
    "replace",
    "link",
    "mkdir",
    "unlink",
    "rmdir",
)
"""Functions of `os` that change files; pathlib, shutil and llmtrain call them by these names."""


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process; its exit status as `os.waitstatus_to_exitcode` gives it.

    The child computes with one thread: a pool of threads that this process has started does not live on in it, and
    would be waited for without end.
    """
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def on_file_operations(tell: Callable[[str, tuple[Any, ...]], object]) -> None:
    """Call `tell` with name and arguments before each file operation, for good: for a process of its own."""
    for name in FILE_OPERATIONS:
        original = getattr(os, name)

        def told(*args: Any, _original: Callable[..., Any] = original, _name: str = name, **kwargs: Any) -> Any:
            tell(_name, args)
            return _original(*args, **kwargs)

        setattr(os, name, told)


def only_within(owner: type, names: Sequence[str], tell: Callable[..., object]) -> Callable[..., None]:
    """`tell`, silent in threads that are not inside one of these methods. For good: for a process of its own."""
    here = threading.local()
    for name in names:
        original = getattr(owner, name)

        def entered(*args: Any, _original: Callable[..., Any] = original, **kwargs: Any) -> Any:
            here.depth = getattr(here, "depth", 0) + 1
            try:
                return _original(*args, **kwargs)
            finally:
                here.depth -= 1

        setattr(owner, name, entered)

    def told(*args: Any) -> None:
        if getattr(here, "depth", 0):
            tell(*args)

    return told


def die_at(number: int) -> Callable[..., None]:
    """What kills this process when it is called for the `number`-th time, from 1, by whichever thread."""
    calls = itertools.count(1)

    def die(*_: object) -> None:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return die
