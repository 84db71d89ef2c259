"""The base class and the field types that all configuration sections share."""

import unicodedata
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from llmtrain.errors import ConfigError, Problem


class Section(BaseModel):
    """A part of the configuration: immutable, and closed to keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    NARROWED: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Sections within this one of which only these keys have a meaning here."""

    def with_keys(self, keys: Mapping[str, Any], above: str = "") -> Self:
        """The same section with other values under some keys, checked as those of a file are.

        Keys are dotted: `{"train.steps": 5}` changes one key of a section within, and `{"train": {"steps": 5}}` gives
        a whole new section. `above` is the section's own place, for errors. Rules between keys are not asked. Raises
        ConfigError for unknown keys and wrong values.
        """
        values: dict[str, Any] = {name: getattr(self, name) for name in self.model_fields_set}
        within: dict[str, dict[str, Any]] = {}
        for key, value in keys.items():
            name, _, rest = key.partition(".")
            if rest:
                within.setdefault(name, {})[rest] = value
            else:
                values[name] = value
        for name, inner in within.items():
            before = values.get(name, getattr(self, name, None))
            if isinstance(before, Section):
                values[name] = before.with_keys(inner, f"{above}{name}.")
            else:
                values[name] = {**before, **inner} if isinstance(before, Mapping) else inner
        try:
            return type(self).model_validate(values)
        except ValidationError as error:
            raise ConfigError(
                [
                    Problem(above + ".".join(map(str, fault["loc"])), f"{fault['msg']}.", fault["input"])
                    for fault in error.errors(include_url=False)
                ]
            ) from error


def whole_number(value: Any) -> Any:
    """`1e9` is a float in YAML; where a count is wanted it means the whole number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


AsWhole = BeforeValidator(whole_number)
"""Stands behind the bounds of a type: before them, it would hide them from the JSON schema."""

Count = Annotated[int, Field(ge=1, le=1_000_000), AsWhole]
"""A number of things that are counted one by one: entries, attempts, steps that are prepared ahead."""
CountOrZero = Annotated[int, Field(ge=0, le=1_000_000), AsWhole]
Steps = Annotated[int, Field(ge=1, le=10**9), AsWhole]
StepsOrZero = Annotated[int, Field(ge=0, le=10**9), AsWhole]
Layers = Annotated[int, Field(ge=1, le=10_000), AsWhole]
Width = Annotated[int, Field(ge=1, le=2**24), AsWhole]
"""One side of a weight."""
Length = Annotated[int, Field(ge=1, le=2**30), AsWhole]
"""Positions of a sequence: kernels count them in 32 bits."""
LengthOrZero = Annotated[int, Field(ge=0, le=2**30), AsWhole]
TokenId = Annotated[int, Field(ge=0, lt=2**30), AsWhole]
Ranks = Annotated[int, Field(ge=1, le=2**20), AsWhole]
RanksOrZero = Annotated[int, Field(ge=0, lt=2**20), AsWhole]
Weight = Annotated[int, Field(ge=1, le=10**12), AsWhole]
"""Shares of a mixture, of which a common divisor is taken out."""
WeightOrZero = Annotated[int, Field(ge=0, le=10**12), AsWhole]
Samples = Annotated[int, Field(ge=1, le=10**18), AsWhole]
"""Samples of a run, or tokens, counted over all of it."""
Threads = Annotated[int, Field(ge=0, le=4096), AsWhole]
Batch = Annotated[int, Field(ge=1, le=2**24), AsWhole]
"""Sequences."""
Seconds = Annotated[float, Field(gt=0, le=1e9)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, le=1e9)]
NotNegative = Annotated[float, Field(ge=0, le=1e9)]

LONGEST_PATH = 4096
"""Linux takes no longer one, and no longer text is a name of anything."""


def without_controls(text: str) -> str:
    """A text that can be a path, an address or a name: no character that a terminal or the system interprets."""
    found = next((character for character in text if unicodedata.category(character) in ("Cc", "Cs")), None)
    if found is not None:
        raise ValueError(f"must have no control characters, such as {found!a} in it")
    return text


Text = Annotated[str, Field(max_length=LONGEST_PATH), AfterValidator(without_controls)]


def as_tuple(value: Any) -> Any:
    """YAML has lists only; immutable sections hold tuples."""
    return tuple(value) if isinstance(value, list) else value


AsTuple = BeforeValidator(as_tuple)
