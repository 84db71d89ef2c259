"""The project's own source files, parsed, for the checks of this folder."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("llmtrain", "launch", "data_pipelines")


@dataclass(frozen=True)
class SourceFile:
    """A Python file; `path` is relative to the repository, with forward slashes."""

    path: str
    text: str

    @property
    def num_lines(self) -> int:
        return len(self.text.splitlines())

    def parsed(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    def imported_modules(self) -> Iterator[tuple[int, str]]:
        """Line and full name of every absolute import, inside functions too, strings for import_module included."""
        for node in ast.walk(self.parsed()):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                yield node.lineno, node.module
            elif isinstance(node, ast.Call) and _called_name(node.func) in ("import_module", "__import__"):
                arguments = [a.value for a in node.args[:1] if isinstance(a, ast.Constant)]
                yield from ((node.lineno, name) for name in arguments if isinstance(name, str))


def _called_name(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def read_sources(root: Path = ROOT, packages: tuple[str, ...] = PACKAGES) -> list[SourceFile]:
    """Every Python file of the packages, in the order of their paths."""
    return [
        SourceFile(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8"))
        for package in packages
        for path in sorted((root / package).rglob("*.py"))
    ]
