"""What the manifest of a pruned model says of its pruning, for the cards of its exports."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmtrain.errors import CheckpointError
from llmtrain.words import fault_text, perplexities_text

PRUNED = "pruned"
"""The key in the manifest's `about`."""

_Word = Annotated[str, Field(max_length=100)]
_Perplexity = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class PruningRecord(BaseModel):
    """What was pruned, and the perplexities before and after, of a text with so many targets. It may gain keys."""

    model_config = ConfigDict(strict=True, frozen=True)

    kind: _Word
    method: _Word
    perplexity_before: _Perplexity
    perplexity_after: _Perplexity
    targets: Annotated[int, Field(gt=0)]

    def told(self) -> str:
        """One line of a model card."""
        numbers = perplexities_text(self.perplexity_before, self.perplexity_after, self.targets)
        return f"{self.kind} by {self.method}; perplexity {numbers}"


def pruning_record(path: Path, about: Mapping[str, Any]) -> PruningRecord | None:
    """That of a checkpoint that pruning has written. Raises CheckpointError where it is damaged."""
    if PRUNED not in about:
        return None
    try:
        return PruningRecord.model_validate(about[PRUNED])
    except ValidationError as error:
        raise CheckpointError(f"{path}: the manifest's about.{PRUNED}: {fault_text(error)}") from None
