"""The keys, words and numbers that are legal, and those of them that are nearest to what a user wrote. Pure."""

import types
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from llmtrain.config.schema import RunConfig
from llmtrain.config.section import Section

FAMILIAR_NAMES = {
    "learning_rate": "optim.lr",
    "batch_size": "train.global_batch_size",
    "max_steps": "train.steps",
    "max_iters": "train.steps",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "dtype": "train.precision",
    "context_length": "data.seq_len",
    "gpus": "launch.num_workers",
    "world_size": "launch.num_workers",
    "gradient_clipping": "optim.grad_clip",
}
"""Names that other programs have for some of our keys, where the spelling gives no hint."""

SEARCH_WIDTH = 4096
"""Distance from a value within which legal values are looked for."""


def sections_of(annotation: Any) -> tuple[type[Section], bool] | None:
    """The section class in a field's type, and whether the field is a list of them; None for plain values."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation, False
    if get_origin(annotation) is Annotated:
        return sections_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType, tuple):
        for part in get_args(annotation):
            found = sections_of(part)
            if found:
                return found[0], get_origin(annotation) is tuple
    return None


def field_at(path: Sequence[str | int], root: type[Section] = RunConfig) -> FieldInfo | None:
    """The schema's field at a path; None where the schema has none."""
    section: type[Section] | None = root
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


def section_at(path: Sequence[str | int], root: type[Section] = RunConfig) -> type[Section] | None:
    """The section class at a path (empty: the whole file); None where there is none."""
    if not path:
        return root
    field = field_at(path, root)
    found = sections_of(field.annotation) if field else None
    return found[0] if found else None


@cache
def all_keys(section: type[Section] = RunConfig, prefix: str = "") -> tuple[str, ...]:
    """Every dotted key of the schema; the entries of a list are shown as entry 0."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(f"{prefix}{name}")
        found = sections_of(field.annotation)
        if found:
            within = f"{keys[-1]}.0." if found[1] else f"{keys[-1]}."
            narrowed = section.NARROWED.get(name)
            keys += all_keys(found[0], within) if narrowed is None else [within + key for key in narrowed]
    return tuple(keys)


def known_names(path: Sequence[str | int], root: type[Section]) -> Sequence[str]:
    """The names of the keys of the section at a path; none where there is no section."""
    section = section_at(path, root)
    return root.NARROWED.get(".".join(map(str, path)), tuple(section.model_fields)) if section else ()


def nearest(word: str, candidates: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """The candidate most like a word, if one is; case and hyphens do not count."""
    by_form = {candidate.casefold().replace("-", "_"): candidate for candidate in candidates}
    return [by_form[form] for form in get_close_matches(word.casefold().replace("-", "_"), by_form, 1, cutoff)]


def suggested_keys(path: Sequence[str | int], root: type[Section] = RunConfig) -> list[str]:
    """Legal dotted keys that an unknown one may have meant, best first.

    Names known from elsewhere come first, then the same name in another section, then similar names nearby,
    then similar names anywhere.
    """
    name = str(path[-1])
    known = all_keys(root)
    if FAMILIAR_NAMES.get(name) in known:
        return [FAMILIAR_NAMES[name]]
    elsewhere = [key for key in known if key.rsplit(".", 1)[-1] == name]
    if elsewhere:
        return elsewhere[:3]
    prefix = "".join(f"{part}." for part in path[:-1])
    nearby = [prefix + found for found in nearest(name, known_names(path[:-1], root))]
    if nearby:
        return nearby
    leaves = {key.rsplit(".", 1)[-1]: key for key in reversed(known)}
    return [leaves[found] for found in nearest(name, leaves, cutoff=0.75)]


def either(values: Iterable[Any]) -> str:
    """`1, 2 or 4`."""
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def nearest_divisors(number: int, value: int, limit: int = 4) -> list[int]:
    """The divisors of `number` nearest to `value`, in ascending order."""
    value = min(value, number)
    # A window around the value, so that an absurdly large number costs no absurdly long search.
    window = range(max(2, value - SEARCH_WIDTH), min(number, value + SEARCH_WIDTH) + 1)
    divisors = [1, *(n for n in window if number % n == 0)]
    return sorted(sorted(divisors, key=lambda n: abs(n - value))[:limit])


def nearest_multiples(unit: int, value: int) -> list[int]:
    """The positive multiples of `unit` on both sides of `value`."""
    below = value // unit * unit
    return [n for n in (below, below + unit) if n > 0]
