"""The names that the schema knows, the one nearest to what a user wrote, and how a value is shown to them."""

import json
import re
import types
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from functools import cache
from typing import Any, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from llmtrain.config.reading.credentials import HIDDEN, text_without_credentials
from llmtrain.config.schema import RunConfig
from llmtrain.config.section import Section

FAMILIAR_NAMES = {
    "learning_rate": "optim.lr",
    "batch_size": "train.global_batch_size",
    "max_steps": "train.steps",
    "max_iters": "train.steps",
    "dtype": "train.precision",
    "context_length": "data.seq_len",
    "gpus": "launch.num_workers",
    "world_size": "launch.num_workers",
    "gradient_clipping": "optim.grad_clip",
}
"""What other programs call some of our keys, where the spelling gives no hint."""

SECRET_WORD = re.compile(r"(?i)(?:^|[_\-.])(?:token|secrets?|passwords?|passphrase|api[_\-]?keys?)(?:$|[_\-.])")
CAMEL_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
LONGEST_SHOWN = 80


def sections_of(annotation: Any) -> tuple[type[Section], bool] | None:
    """The section class in a field's type, and whether the field is a list of them; None for plain values."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation, False
    if get_origin(annotation) in (Union, types.UnionType, tuple):
        for part in get_args(annotation):
            found = sections_of(part)
            if found:
                return found[0], get_origin(annotation) is tuple
    return None


def field_at(path: Sequence[str | int]) -> FieldInfo | None:
    """The schema's field at a path; None where the schema has none."""
    section: type[Section] | None = RunConfig
    field = None
    for part in path:
        if isinstance(part, int):
            continue
        if section is None or part not in section.model_fields:
            return None
        field = section.model_fields[part]
        found = sections_of(field.annotation)
        section = found[0] if found else None
    return field


def section_at(path: Sequence[str | int]) -> type[Section] | None:
    """The section class at a path (empty: the run); None where there is none."""
    if not path:
        return RunConfig
    field = field_at(path)
    found = sections_of(field.annotation) if field else None
    return found[0] if found else None


def iter_keys(section: type[Section] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the schema; the entries of a list are shown as entry 0."""
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        yield key
        found = sections_of(field.annotation)
        if found:
            yield from iter_keys(found[0], f"{key}.0." if found[1] else f"{key}.")


@cache
def all_keys() -> tuple[str, ...]:
    return tuple(iter_keys())


def nearest(word: str, candidates: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """The candidate most like a word, if one is; case and hyphens do not count."""
    by_form = {candidate.casefold().replace("-", "_"): candidate for candidate in candidates}
    return [by_form[form] for form in get_close_matches(word.casefold().replace("-", "_"), by_form, 1, cutoff)]


def suggested_keys(path: Sequence[str | int]) -> list[str]:
    """Legal dotted keys that an unknown one may have meant, best first.

    Names known from elsewhere come first, then the same name in another section, then similar names nearby,
    then similar names anywhere.
    """
    name = str(path[-1])
    if name in FAMILIAR_NAMES:
        return [FAMILIAR_NAMES[name]]
    elsewhere = [key for key in all_keys() if key.rsplit(".", 1)[-1] == name]
    if elsewhere:
        return elsewhere[:3]
    parent = section_at(path[:-1])
    prefix = "".join(f"{part}." for part in path[:-1])
    nearby = [prefix + found for found in nearest(name, parent.model_fields if parent else ())]
    if nearby:
        return nearby
    leaves = {key.rsplit(".", 1)[-1]: key for key in reversed(all_keys())}
    return [leaves[found] for found in nearest(name, leaves, cutoff=0.75)]


def is_secret(name: str) -> bool:
    """Whether a key's name says that its value should not be written down. Keys of the schema never are."""
    if any(name == key.rsplit(".", 1)[-1] for key in all_keys()):
        return False
    return SECRET_WORD.search(CAMEL_HUMP.sub("_", name)) is not None


def shown(key: str, value: Any) -> str:
    """A value as a user would write it in YAML, shortened; what looks like a secret is not repeated."""
    if any(is_secret(part) for part in key.split(".")):
        return HIDDEN
    if isinstance(value, str):
        value = text_without_credentials(value)
        text = value if value.isprintable() else json.dumps(value)
    elif isinstance(value, float):
        text = number(value)
    else:
        text = json.dumps(redacted(value), ensure_ascii=False, default=str)
    return text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 3] + "..."


def number(value: int | float) -> str:
    """A number as YAML 1.2 writes it."""
    text = repr(value)
    return {"nan": ".nan", "inf": ".inf", "-inf": "-.inf"}.get(text, text)


def bound_text(value: int | float) -> str:
    """A bound of the schema: whole numbers with all their digits, so that the text is one of them."""
    return f"{value:g}" if isinstance(value, float) and abs(value) < 1e6 else number(value)


def either(values: Iterable[Any]) -> str:
    """`1, 2 or 4`."""
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def redacted(value: Any) -> Any:
    """JSON-like settings without credentials: URLs lose them, values of keys that name a secret are replaced."""
    if isinstance(value, dict):
        return {key: HIDDEN if is_secret(str(key)) else redacted(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(child) for child in value]
    return text_without_credentials(value) if isinstance(value, str) else value
