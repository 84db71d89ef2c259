"""Findings of the doctor, and those about packages. Imports none of the packages."""

import platform
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

State = Literal["ok", "limited", "missing", "broken"]
"""limited: it works, but not as far as it could. missing: not here, which only matters where it is wanted."""

Section = Literal["packages", "machine", "devices", "engines", "launchers", "records"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at, in words; `mend` is the command that mends it, or says who can.

    Nothing can be trained where something `needed` is missing or broken.
    """

    section: Section
    name: str
    state: State
    text: str
    mend: str = ""
    needed: bool = False


def can_train(findings: Iterable[Finding]) -> bool:
    """True where training is possible, on one rank with the torch engine at least."""
    return not any(finding.needed and finding.state in ("missing", "broken") for finding in findings)


def pip_install(*arguments: str) -> str:
    """The command that installs into this Python's environment, whichever `pip` is first on the path."""
    found = shutil.which("pip")
    ours = found is not None and Path(found).parent == Path(sys.executable).parent
    pip = "pip" if ours else f"{shlex.quote(sys.executable)} -m pip"
    return f"{pip} install {shlex.join(arguments)}"


NEEDED = ("torch",)
"""Without these nothing can be trained. Whether the others are needed shows where the torch engine is tried."""


def requirements() -> list[Requirement]:
    """The packages that llmtrain needs on this platform, optional extras left out."""
    asked = map(Requirement, metadata.requires("llmtrain") or [])
    return [each for each in asked if each.marker is None or each.marker.evaluate({"extra": ""})]


def package_findings(version_of: Callable[[str], str] = metadata.version) -> Iterator[Finding]:
    """Python, and each required package: its version, and whether that is in the range."""
    yield _python()
    for requirement in requirements():
        yield package_finding(requirement, version_of)


def package_finding(requirement: Requirement, version_of: Callable[[str], str] = metadata.version) -> Finding:
    """One package."""
    name, needed = requirement.name, requirement.name in NEEDED
    command = pip_install(wanted(requirement))
    try:
        version = version_of(name)
    except metadata.PackageNotFoundError:
        return Finding("packages", name, "missing", f"not installed; {_range(requirement)}", command, needed)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding("packages", name, "broken", f"{version} is installed; {_range(requirement)}", command, needed)
    return Finding("packages", name, "ok", version)


def wanted(requirement: Requirement) -> str:
    """A requirement as pip takes it, without its marker."""
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"


def _range(requirement: Requirement) -> str:
    return f"llmtrain needs {requirement.specifier}"


def _python() -> Finding:
    asked = SpecifierSet(metadata.metadata("llmtrain")["Requires-Python"] or "")
    version = platform.python_version()
    text = f"{version}, {sys.executable}"
    if asked.contains(version, prereleases=True):
        return Finding("packages", "Python", "ok", text)
    return Finding(
        "packages", "Python", "broken", f"{text}; llmtrain needs {asked}", "make PYTHON=python3.11 install", True
    )
