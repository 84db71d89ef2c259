"""What flows through a pipeline: a document, and what a step makes of it."""

from collections import Counter
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Document:
    """One text and what is known of it. `id` names it among all inputs; `source` is the name of its entry of `read`."""

    id: str
    text: str
    source: str = ""
    url: str = ""
    language: str = ""


@dataclass(frozen=True, slots=True)
class Dropped:
    """A document that is not kept. `reason` is one of a few fixed names, under which it is counted."""

    reason: str


class DocumentStep(Protocol):
    """A pure function of one document: the same document gives the same result, whatever came before it."""

    def __call__(self, document: Document, counts: Counter[str]) -> Document | Dropped:
        """The document as it goes on, the same object where nothing changed, or why it is dropped.

        What was changed within it is added to `counts` under fixed names, such as the number of mails that were masked.
        """
        ...
