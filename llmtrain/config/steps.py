"""The steps of a data pipeline and their keys. Pure: imports nothing that reads data.

In a file, `steps` is a list of names, or of names with their keys: `[normalize, {length: {min_words: 50}}]`.
"""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from llmtrain.config.section import CountOrZero, Section, Steps, StepsOrZero


class LengthStep(Section):
    """Documents that are too short or too long are dropped."""

    min_characters: StepsOrZero = Field(default=1, description="Fewest characters, without white space at the ends.")
    max_characters: Steps | None = Field(default=None, description="Most characters; null: no limit.")
    min_words: CountOrZero = Field(default=0, description="Fewest words, which white space separates.")


class ExactDedupStep(Section):
    """Of documents with the same text, the first stays: that of the first chunk, and in it of the first line."""


class NearDedupStep(Section):
    """Of documents that are nearly the same, the first stays (Broder 1997; Lee et al. 2022, appendix A)."""

    threshold: Annotated[float, Field(ge=0.5, le=0.99)] = Field(
        default=0.8, description="Least Jaccard similarity of the sets of word n-grams of two documents."
    )
    ngram: Annotated[int, Field(ge=1, le=50)] = Field(default=5, description="Words of an n-gram.")


class StepConfig(Section):
    """One step: exactly one of these keys is set."""

    length: LengthStep | None = None
    exact_dedup: ExactDedupStep | None = None
    near_dedup: NearDedupStep | None = None

    @model_validator(mode="after")
    def _one(self) -> "StepConfig":
        if len(self.model_fields_set) != 1:
            raise ValueError("must be one step: a name, or one name with its keys")
        return self

    @property
    def name(self) -> str:
        """The step's name."""
        return next(iter(self.model_fields_set))

    @property
    def section(self) -> Section:
        """The keys of the step."""
        return getattr(self, self.name)


def _with_keys(value: Any) -> Any:
    """`name` and `{name: null}` mean the step with every key at its default."""
    if isinstance(value, str):
        return {value: {}}
    if isinstance(value, dict):
        return {name: {} if keys is None else keys for name, keys in value.items()}
    return value


AnyStep = Annotated[StepConfig, BeforeValidator(_with_keys)]
