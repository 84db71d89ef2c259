"""One thing that was looked at."""

import shlex
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["ok", "limited", "missing", "broken"]
"""limited: it works, but not as far as it could. missing: not here, which only matters where it is wanted."""

Section = Literal["packages", "machine", "devices", "engines", "launchers", "records"]


@dataclass(frozen=True)
class Finding:
    """What was found about one thing, in words; `mend` is the command that mends it, or says who can.

    Nothing can be trained where something `needed` is missing or broken.
    """

    section: Section
    name: str
    state: State
    text: str
    mend: str = ""
    needed: bool = False


def can_train(findings: Iterable[Finding]) -> bool:
    """Whether training is possible, on one rank with the torch engine at least."""
    return not any(finding.needed and finding.state in ("missing", "broken") for finding in findings)


def pip_install(*arguments: str) -> str:
    """The command that installs into this Python's environment, whichever `pip` is first on the path."""
    found = shutil.which("pip")
    ours = found is not None and Path(found).parent == Path(sys.executable).parent
    pip = "pip" if ours else f"{shlex.quote(sys.executable)} -m pip"
    return f"{pip} install {shlex.join(arguments)}"
