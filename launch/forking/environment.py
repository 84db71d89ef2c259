"""Environment variables: those that ranks on other machines get, and this process's own, changed for a while."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase

from llmtrain.config.reading.credentials import is_fixed_variable, is_secret_variable

ALWAYS_PASSED = ("NCCL_*", "GLOO_*", "TORCH_*", "PYTORCH_*", "TORCHINDUCTOR_*", "TRITON_*", "CUDA_LAUNCH_BLOCKING")
"""Settings of communication and computation, which all ranks of a run must have alike."""

URL_WITH_CREDENTIALS = re.compile(r"://[^/\s]*@")


def passed_environment(environ: Mapping[str, str], patterns: Iterable[str] = ()) -> dict[str, str]:
    """The variables of `environ` that all ranks get: those of ALWAYS_PASSED and of the user's patterns.

    A pattern is a name, or NAME* for all that begin so. Secrets are never among them, by name or as part of a URL, nor
    what says which rank a process is, nor what belongs to Ray, Slurm or one machine.
    """
    wanted = (*ALWAYS_PASSED, *patterns)
    return {
        name: value
        for name, value in environ.items()
        if any(fnmatchcase(name, pattern) for pattern in wanted)
        and not is_secret_variable(name)
        and not is_fixed_variable(name)
        and not URL_WITH_CREDENTIALS.search(value)
    }


@contextmanager
def changed_environment(settings: Mapping[str, str], without: Iterable[str] = ()) -> Iterator[None]:
    """This process's environment with these settings and without those variables, until the end of the block."""
    before = {name: os.environ.get(name) for name in (*settings, *without)}
    os.environ.update(settings)
    for name in without:
        os.environ.pop(name, None)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
