"""`python -m tests.support.blocked_command PLACE ARGUMENT ...`: the command, which comes to a place and stays there.

A place is `module:name` or `module:Class.name` of a function, or `import:package`. Once there it writes `blocked` to
stderr. With `native:` before the place, native code stays there, which hears no signal.
"""

import hashlib
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

BLOCKED = "blocked"


def block(*_: object, **__: object) -> None:
    print(BLOCKED, file=sys.stderr, flush=True)
    time.sleep(600)


def block_natively(*_: object, **__: object) -> None:
    print(BLOCKED, file=sys.stderr, flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # half an hour


class BlockedImport:
    """Finds no package, and does not come back from looking for one of them."""

    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if name == self._package:
            block()


def main() -> None:
    place = sys.argv.pop(1)
    stay = block_natively if place.startswith("native:") else block
    place = place.removeprefix("native:")
    module, _, name = place.partition(":")
    if module == "import":
        sys.meta_path.insert(0, BlockedImport(name))
    else:
        *outer, last = name.split(".")
        holder = import_module(module)
        for part in outer:
            holder = getattr(holder, part)
        assert hasattr(holder, last)
        setattr(holder, last, stay)

    from llmtrain.cli import main as command

    command()


if __name__ == "__main__":
    main()
