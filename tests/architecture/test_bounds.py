"""Every value of a configuration is bounded: numbers on both sides, texts and lists in length."""

from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from pydantic import AfterValidator, Field
from pydantic.fields import FieldInfo

from llmtrain.config.reading.suggestions import all_keys, sections_of
from llmtrain.config.schema import RunConfig
from llmtrain.config.section import AsTuple, Section

LARGEST = 10**18
"""Sums and products of a few such numbers are far from where Python refuses to print them."""


def bounds_of(metadata: list[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in metadata:
        if isinstance(item, FieldInfo):
            found |= bounds_of(item.metadata)
        for name in ("ge", "gt", "le", "lt", "max_length", "pattern", "allow_inf_nan"):
            if getattr(item, name, None) is not None:
                found[name] = getattr(item, name)
    return found


def unbounded(annotation: Any, metadata: list[Any], key: str) -> Iterator[str]:
    """What of a field's type has no bound."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from unbounded(arguments[0], [*metadata, *arguments[1:]], key)
    elif origin in (Union, UnionType):
        for part in arguments:
            yield from unbounded(part, metadata, key)
    elif origin is tuple:
        is_list = arguments[-1] is Ellipsis
        if is_list and "max_length" not in bounds_of(metadata):
            yield f"{key}: a list without a greatest length"
        for part in arguments[:1] if is_list else arguments:
            yield from unbounded(part, [], key)
    elif origin is Literal or annotation in (bool, type(None)) or sections_of(annotation):
        return
    elif annotation in (int, float):
        bounds = bounds_of(metadata)
        lower, upper = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
        if lower is None or upper is None:
            yield f"{key}: a number without a bound on both sides"
        elif not -LARGEST <= lower < upper <= max(LARGEST, 2**63):
            yield f"{key}: bounds {lower} and {upper}"
    elif annotation is str:
        bounds = bounds_of(metadata)
        if "max_length" not in bounds and not bounds.get("pattern", "").endswith("}$"):
            yield f"{key}: a text without a greatest length"
    else:
        yield f"{key}: {annotation} is no type of a configuration"


def unbounded_fields(section: type[Section], prefix: str = "") -> Iterator[str]:
    if section.model_config.get("allow_inf_nan") is not False:
        yield f"{prefix}: takes numbers that are not finite"
    for name, field in section.model_fields.items():
        yield from unbounded(field.annotation, field.metadata, f"{prefix}{name}")
        found = sections_of(field.annotation)
        if found:
            yield from unbounded_fields(found[0], f"{prefix}{name}.")


def test_every_value_is_bounded() -> None:
    assert len(list(all_keys())) > 150
    assert list(unbounded_fields(RunConfig)) == []


@pytest.mark.parametrize(
    "kind",
    [
        int,
        float | None,
        Annotated[int, Field(ge=0)],
        Annotated[float, Field(lt=1)],
        Annotated[int, Field(ge=0, le=10**30)],
        Annotated[tuple[Annotated[int, Field(ge=0, le=1)], ...], AsTuple],
        Annotated[tuple[int, ...], AsTuple, Field(max_length=3)],
        str,
        Annotated[str, AfterValidator(str.strip)],
        Annotated[str, Field(pattern="^a+$")],
        dict[str, int],
    ],
)
def test_values_without_bounds_are_found(kind: Any) -> None:
    class Loose(Section):
        value: kind

    assert len(list(unbounded_fields(Loose))) == 1
