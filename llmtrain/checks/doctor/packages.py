"""What is installed, beside what llmtrain's own metadata asks for. Imports none of it."""

import platform
import sys
from collections.abc import Callable, Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from llmtrain.checks.doctor.finding import Finding, pip_install

NEEDED = ("torch",)
"""Without these nothing can be trained. Whether the others are needed shows where the torch engine is tried."""


def requirements() -> list[Requirement]:
    """What llmtrain needs on this platform, optional extras left out."""
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
