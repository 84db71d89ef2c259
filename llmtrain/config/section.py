"""The base class and the field types that all configuration sections share."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """A part of the configuration: immutable, and closed to keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def whole_number(value: Any) -> Any:
    """`1e9` is a float in YAML; where a count is wanted it means the whole number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


AsWhole = BeforeValidator(whole_number)
"""Stands behind the bounds of a type: before them, it would hide them from the JSON schema."""

Count = Annotated[int, Field(ge=1), AsWhole]
CountOrZero = Annotated[int, Field(ge=0), AsWhole]
Probability = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


def as_tuple(value: Any) -> Any:
    """YAML has lists only; immutable sections hold tuples."""
    return tuple(value) if isinstance(value, list) else value


AsTuple = BeforeValidator(as_tuple)
