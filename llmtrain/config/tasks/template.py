"""Texts with fields, such as `Question: {question}`: what a task makes of the keys of a sample. Pure.

A field is a key, or keys and places of a list behind each other: `{answers.text.0}`. `{{` and `}}` stand for braces.
Nothing is computed, so a file of tasks from elsewhere cannot do anything.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_PARTS = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]|[^{}]+")


@dataclass(frozen=True)
class Field:
    """A place in a sample: its keys from the outside in."""

    path: tuple[str, ...]

    def of(self, sample: Mapping[str, Any]) -> Any:
        """The value. Raises ValueError where there is none."""
        value: Any = sample
        for depth, key in enumerate(self.path):
            if isinstance(value, Mapping) and key in value:
                value = value[key]
            elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
                value = value[int(key)]
            else:
                name, outer = ".".join(self.path[: depth + 1]), value
                known = f" It has {', '.join(map(str, outer))}." if isinstance(outer, Mapping) and outer else ""
                raise ValueError(f"has no {name!r}.{known}")
        return value


@dataclass(frozen=True)
class Template:
    """A text, cut into what stands there as it is and fields."""

    parts: tuple[str | Field, ...]

    @staticmethod
    def of(text: str) -> "Template":
        """Raises ValueError where braces are not in pairs or hold no field."""
        parts = list[str | Field]()
        for found in _PARTS.finditer(text):
            piece = found[0]
            if piece in ("{", "}"):
                raise ValueError(f"has a single {piece} in it. Write {piece * 2} for a brace, {{name}} for a field")
            if piece in ("{{", "}}"):
                parts.append(piece[0])
            elif piece[0] == "{":
                path = tuple(found[1].strip().split("."))
                if not all(path):
                    raise ValueError(f"{piece} names no field. Write {{name}}, or {{name.inner}} or {{name.0}}")
                parts.append(Field(path))
            else:
                parts.append(piece)
        return Template(tuple(parts))

    def text(self, sample: Mapping[str, Any]) -> str:
        """Raises ValueError where a field is missing, or is no text, number, true or false."""
        return "".join(part if isinstance(part, str) else _shown(part, part.of(sample)) for part in self.parts)

    def texts(self, sample: Mapping[str, Any]) -> list[str]:
        """The text; where the template is one field that holds a list, the text of each entry. Raises ValueError."""
        if len(self.parts) == 1 and isinstance(field := self.parts[0], Field):
            value = field.of(sample)
            if isinstance(value, list):
                return [_shown(field, entry) for entry in value]
        return [self.text(sample)]


def _shown(field: Field, value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float):
        return str(value)
    kind = {dict: "an object", list: "a list", type(None): "null"}.get(type(value), type(value).__name__)
    raise ValueError(f"has {kind} in {'.'.join(field.path)!r}, where a text or a number is needed.")
