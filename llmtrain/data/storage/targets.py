"""The second member of a document: which of its tokens are targets, or what is to be said of it.

Beside `<key>.bin` a shard may hold `<key>.trained`, uint32 pairs [start, end) of tokens that are targets, or
`<key>.labels`, int32: one for the document, one for each token, or the bounds of a passage. Both are little-endian. The
manifest says which of the two all documents of a data set have, and what is to be known to use them. Imports no torch.
"""

import hashlib
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, StrictStr, model_validator
from pydantic.dataclasses import dataclass

Targets = Literal["none", "trained", "labels"]

TARGET_DTYPES = {"trained": np.dtype("<u4"), "labels": np.dtype("<i4")}
"""Stored types. A member's name ends with the name of its kind."""

Task = Literal["classification", "tagging", "qa"]

NO_LABEL = -100
"""tagging: a token that has no label, such as the second piece of a word."""

Count = Annotated[int, Field(strict=True, ge=0)]
_KNOWN_KEYS = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_KNOWN_KEYS)
class ChatRecord:
    """The making of conversations. `end_ids` are the tokens that end a turn: the last of what a turn trains is one."""

    template: StrictStr
    """The text of the jinja template."""
    template_sha256: StrictStr
    end_ids: tuple[Count, ...]
    trained_tokens: dict[StrictStr, Count]
    """How many tokens are targets in all documents, by role."""

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if (actual := hashlib.sha256(self.template.encode()).hexdigest()) != self.template_sha256:
            raise ValueError(f"template_sha256 = {self.template_sha256}, and the template's is {actual}")
        return self


@dataclass(frozen=True, config=_KNOWN_KEYS)
class LabelsRecord:
    """The meaning of labels: label i is `names[i]`. qa has no names: its labels are bounds of the answer.

    `family` is the kind of model that texts are framed for: an encoder's begin with a token that stands for all of
    them, a decoder's are classified by their last one. `separator_id` stands between the two texts of pairs, of which
    there are some where it is given. `counts` says how often each label occurs.
    """

    task: Task
    names: tuple[StrictStr, ...] = ()
    family: Literal["encoder", "decoder"] = "encoder"
    separator_id: Count | None = None
    counts: tuple[Count, ...] = ()

    def differences(self, other: Self) -> list[str]:
        """What labels and texts of two data sets mean otherwise; how often a label occurs is no meaning."""
        keys = ("task", "names", "family", "separator_id")
        pairs = ((key, getattr(self, key), getattr(other, key)) for key in keys)
        return [f"{key} = {theirs}, not {ours}" for key, ours, theirs in pairs if ours != theirs]

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if bool(self.names) == (self.task == "qa"):
            raise ValueError(f"task = {self.task}, names = {list(self.names)}: qa has none, the others need some")
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"names = {list(self.names)}: a name occurs twice")
        return self


def stored_targets(values: Any, kind: Targets) -> bytes:
    """The bytes of a member: pairs [spans, 2] or labels [n]."""
    return np.asarray(values).astype(TARGET_DTYPES[kind]).tobytes()


def trained_fault(spans: NDArray[np.int64], num_tokens: int) -> str | None:
    """What is wrong with spans [n, 2] of a document of so many tokens; None for nothing."""
    bounds = spans.ravel()
    if not len(spans):
        return "no token is a target"
    if (spans[:, 0] >= spans[:, 1]).any() or (np.diff(bounds) < 0).any():
        return f"its {len(spans)} spans, from {spans[0].tolist()} on, are empty or do not follow each other"
    if bounds[-1] > num_tokens:
        return f"a span ends at {bounds[-1]}, and it has {num_tokens} tokens"
    return None


def labels_fault(labels: NDArray[np.int64], num_tokens: int, record: LabelsRecord) -> str | None:
    """What is wrong with the labels [n] of a document of so many tokens; None for nothing."""
    expected = {"classification": 1, "tagging": num_tokens, "qa": 2}[record.task]
    if len(labels) != expected:
        return f"it has {len(labels)} labels, and {record.task} wants {expected}"
    if record.task == "qa":
        start, end = labels.tolist()
        return None if 0 <= start <= end <= num_tokens else f"its answer [{start}, {end}) is not in {num_tokens} tokens"
    given = labels[labels != NO_LABEL] if record.task == "tagging" else labels
    wrong = given[(given < 0) | (given >= len(record.names))]
    return f"it has the label {wrong[0]}, and there are {len(record.names)}" if len(wrong) else None
