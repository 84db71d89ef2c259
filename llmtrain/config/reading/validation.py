"""From a tree of plain values to a configuration, with every fault of the schema said in the user's words.

A tree with faults still gives one: what is wrong is left out and stands at its default, so that the rules
can say in the same breath what else is wrong. What rests on something left out is not to be believed; those keys
are returned beside the config.
"""

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from llmtrain.config.reading.document import dotted
from llmtrain.config.reading.rendering import bound_text, is_secret, shown
from llmtrain.config.reading.suggestions import either, field_at, known_names, nearest, sections_of, suggested_keys
from llmtrain.config.section import Section
from llmtrain.errors import Problem

Root = TypeVar("Root", bound=Section)
"""The class of a whole file."""

STAND_INS: dict[str, Any] = {
    "name": "unnamed",
    "path": "(missing)",
    "teacher": "(missing)",
    "names": ["(missing)"],
    "scale": 1.0,
    "train": [{"path": "(missing)"}],
    "read": [{"path": "(missing)"}],
    "files": ["(missing)"],
    "steps": [1, 1],
    "weights": [1],
    "from_step": 2,
    "global_batch_size": 1,
}
"""Values that take the place of required ones that are missing; sections become empty."""

MISSPELT = 0.95
"""Likeness of a word to a key of the same section above which it is that key, whatever else it says: `shard_token`."""

MOST_REPAIRS = 16
"""A repair can uncover at most one more level of missing keys; the schema is far less deep than this."""

TYPE_NAMES = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be text",
    "bool_type": "must be true or false",
    "model_type": "must be a section with keys of its own",
    "model_attributes_type": "must be a section with keys of its own",
    "tuple_type": "must be a list",
}
LENGTH_NAMES = {
    "string_too_long": "must have {max_length} characters at most",
    "string_unicode": "must be Unicode, without halves of surrogate pairs",
    "too_short": "must have at least {min_length} entry",
    "too_long": "must have {max_length} entries at most",
}
BOUND_NAMES = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}


@dataclass(frozen=True)
class Validation(Generic[Root]):
    """`doubtful` holds the dotted keys whose value in `config` is not what the user meant."""

    config: Root
    problems: list[Problem]
    doubtful: frozenset[str]

    def is_sound(self, problem: Problem) -> bool:
        """False where a rule's problem rests on something doubtful."""
        keys = (problem.key, *problem.uses)
        return not any(_within(key, doubt) or _within(doubt, key) for key in keys for doubt in self.doubtful)


def validate(tree: dict[str, Any], root: type[Root], unread: Iterable[str] = ()) -> Validation[Root]:
    """Check a tree against the schema. `unread` names sections of which a part could not be read at all."""
    tree = copy.deepcopy(tree)
    doubtful = set(unread)
    problems: list[Problem] = []
    for attempt in range(MOST_REPAIRS):
        try:
            return Validation(root.model_validate(tree), problems, frozenset(doubtful))
        except ValidationError as error:
            errors = _first_faults(error.errors(include_url=False))
        for details in errors:
            if details["type"] == "extra_forbidden":
                doubtful.update(key for key in suggested_keys(details["loc"], root) if not _has(tree, key))
        if attempt == 0:
            # A key is also missing where it is misspelt or in a file that cannot be read: that is reported already.
            follows = [
                details["type"] == "missing"
                and any(_within(".".join(map(str, details["loc"])), key) for key in doubtful)
                for details in errors
            ]
            problems = [_problem(details, root) for details, known in zip(errors, follows, strict=True) if not known]
        for details in errors:
            doubtful.add(_repair(tree, details, root))
    raise AssertionError(f"the schema cannot be satisfied by taking out what is wrong: {tree}")


def _first_faults(errors: list[ErrorDetails]) -> list[ErrorDetails]:
    """Without lists that are too short only because entries of theirs are wrong."""
    return [
        details
        for details in errors
        if details["type"] != "too_short"
        or not any(
            len(other["loc"]) > (end := len(details["loc"])) and other["loc"][:end] == details["loc"]
            for other in errors
        )
    ]


def _within(key: str, other: str) -> bool:
    """True where a key is another one or lies within it. The empty key is the whole file."""
    return key == other or not other or key.startswith(f"{other}.")


def _repair(tree: dict[str, Any], details: ErrorDetails, root: type[Section]) -> str:
    """Take the offending value out of the tree, or put a stand-in where one is missing; returns the dotted key."""
    path = list(details["loc"])
    if details["type"] == "missing" and isinstance(path[-1], str):
        field = field_at(path, root)
        section = sections_of(field.annotation) if field and len(path) == 1 else None
        _holder(tree, path)[path[-1]] = {} if section and not section[1] else STAND_INS[path[-1]]
        return dotted(*path)
    # Entries of a list keep their numbers, so a list goes as a whole when an entry is not a section.
    while isinstance(path[-1], int):
        path.pop()
    _holder(tree, path).pop(path[-1], None)
    return dotted(*path)


def _holder(tree: Any, path: list[str | int]) -> Any:
    for part in path[:-1]:
        tree = tree[part]
    return tree


def _has(tree: Any, key: str) -> bool:
    """True where somebody wrote the key; then a misspelling elsewhere was not meant for it."""
    for part in key.split("."):
        if isinstance(tree, list) and part.isdecimal() and int(part) < len(tree):
            tree = tree[int(part)]
        elif isinstance(tree, dict) and part in tree:
            tree = tree[part]
        else:
            return False
    return True


def _problem(details: ErrorDetails, root: type[Section]) -> Problem:
    path = details["loc"]
    key = dotted(*path)
    value = None if details["type"] == "missing" else shown(key, details["input"])
    if details["type"] == "extra_forbidden":
        return Problem(key, _unknown(path, root), value)
    if details["type"] == "missing":
        field = field_at(path, root)
        return Problem(key, f"is required. {field.description if field and field.description else ''}".rstrip())
    field = field_at(path, root)
    return Problem(key, _requirement(details, field) + _advice(details, field), value)


def _unknown(path: tuple[str | int, ...], root: type[Section]) -> str:
    name = str(path[-1])
    known = known_names(path[:-1], root)
    misspelt = nearest(name, known, MISSPELT)
    if is_secret(name) and not misspelt:
        return (
            "looks like a secret, which would be copied into the run folder and into logs. Use an environment variable."
        )
    if name == "base":
        return "`base` belongs into a file: the command line sets single keys."
    guesses = suggested_keys(path, root)
    if guesses:
        return f"unknown key. Did you mean {either(guesses)}?"
    return f"unknown key. Known here: {', '.join(known)}." if known else "unknown key."


def _requirement(details: ErrorDetails, field: FieldInfo | None) -> str:
    """The requirement that a value breaks."""
    kind, context = details["type"], details.get("ctx", {})
    if kind in ("model_type", "model_attributes_type") and field is not None:
        found = sections_of(field.annotation)
        return TYPE_NAMES[kind] + (f": {', '.join(found[0].model_fields)}" if found else "")
    if kind in TYPE_NAMES:
        return TYPE_NAMES[kind]
    if kind == "literal_error":
        return f"must be {either(_choices(details))}"
    if kind == "string_pattern_mismatch":
        return field.description.rstrip(".") if field and field.description else details["msg"]
    if kind in LENGTH_NAMES:
        return LENGTH_NAMES[kind].format(**context)
    for bound, words in BOUND_NAMES.items():
        if bound in context:
            return f"must be {words} {bound_text(context[bound])}"
    return str(context["error"]) if kind == "value_error" else details["msg"]


def _advice(details: ErrorDetails, field: FieldInfo | None) -> str:
    """The advice about a wrong value, which ends the sentence."""
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    tries = _tries(kind, value, context, details)
    if tries:
        return f". Try {either(tries)}."
    default = None if field is None or isinstance(details["loc"][-1], int) else field.default
    if isinstance(default, (int, float, str)):
        return f". The default is {shown('', default)}."
    description = field.description if field and field.description and kind != "string_pattern_mismatch" else ""
    return f". {description}".rstrip()


def _tries(kind: str, value: Any, context: dict[str, Any], details: ErrorDetails) -> list[Any]:
    """The nearest legal values, where there are some."""
    if kind == "literal_error":
        choices = _choices(details)
        return nearest(str(value), choices) if len(choices) > 1 else choices
    if kind == "string_pattern_mismatch":
        fitting = re.sub(r"[^A-Za-z0-9_.-]+", "-", str(value)).strip("-")[:64]
        return [fitting] if fitting else []
    if kind == "bool_type":
        words = {"yes": "true", "on": "true", "1": "true", "no": "false", "off": "false", "0": "false"}
        return [words[str(value).casefold()]] if str(value).casefold() in words else []
    if kind in ("int_type", "int_from_float") and isinstance(value, float) and abs(value) < 1e15:
        return [int(value // 1), int(value // 1) + 1]
    if kind in ("int_type", "float_type") and isinstance(value, str):
        found = re.fullmatch(r"[0-9]+" if kind == "int_type" else r"[0-9.]+(e[+-]?[0-9]+)?", value.strip())
        return [f"{value.strip()} without quotes"] if found else []
    if kind == "string_type" and isinstance(value, (bool, int, float)):
        return [f"'{shown('', value)}' in quotes"]
    return [bound_text(context[bound]) for bound in ("ge", "le") if bound in context]


def _choices(details: ErrorDetails) -> list[str]:
    """The words that a literal allows, out of pydantic's list `'a', 'b' or 'c'`."""
    return re.findall(r"'([^']*)'", details.get("ctx", {})["expected"])
