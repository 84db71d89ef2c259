"""A server of commands whose children obey permissions, and are ended by the system where they need more processor time
or memory than they are given."""

import ctypes
import os
import resource
from pathlib import Path
from typing import Any

from tests.support.command_server import serve

CAPABILITY_VERSION = 0x20080522
OVERRIDING_CAPABILITIES = 0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH


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


def prepare(request: dict[str, Any]) -> None:
    os.setsid()
    obey_permissions()
    limit(request["cpu_seconds"], request["more_bytes"])


if __name__ == "__main__":
    serve(prepare)
