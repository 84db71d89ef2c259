"""What can be done with a model beside steps of a batch: on a whole one, and on its parts by every rank that has one.

A work travels as whole numbers behind the number of its kind.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from llmtrain.data.tasks.metrics import LogLikelihood
from llmtrain.data.tasks.tokens import ScoredText
from llmtrain.infer.embedding import embedding
from llmtrain.infer.evaluation.scoring import log_likelihoods
from llmtrain.infer.fillings import Filling, fill_masks
from llmtrain.infer.links import WHOLE, StageLinks
from llmtrain.infer.sharded.messages import NumberReader
from llmtrain.models.transformer import Transformer

Found = TypeVar("Found", covariant=True)


class ModelWork(Protocol[Found]):
    """Something to find out with a model."""

    def numbers(self) -> list[int]:
        """All that there is to say of it, for `read`."""
        ...

    def run(self, model: Transformer, links: StageLinks = WHOLE) -> Found:
        """Do it with a model, or with a part that `links` join to the others."""
        ...


@dataclass(frozen=True)
class TextScoring:
    """How likely texts are."""

    texts: Sequence[ScoredText]

    def numbers(self) -> list[int]:
        parts = ((text.first, len(text.ids), *text.ids, len(text.source), *text.source) for text in self.texts)
        return [len(self.texts), *(number for part in parts for number in part)]

    @staticmethod
    def read(reader: NumberReader) -> "TextScoring":
        texts = list[ScoredText]()
        for _ in range(reader.one()):
            first = reader.one()
            texts.append(ScoredText(reader.some(), first, reader.some()))
        return TextScoring(texts)

    def run(self, model: Transformer, links: StageLinks = WHOLE) -> list[LogLikelihood]:
        return log_likelihoods(model, self.texts, links=links)


@dataclass(frozen=True)
class Embedding:
    """The vector of the text that begins at the place `first`, [H]."""

    ids: Sequence[int]
    first: int = 0

    def numbers(self) -> list[int]:
        return [len(self.ids), *self.ids, self.first]

    @staticmethod
    def read(reader: NumberReader) -> "Embedding":
        return Embedding(reader.some(), reader.one())

    def run(self, model: Transformer, links: StageLinks = WHOLE) -> Tensor:
        return embedding(model, self.ids, self.first, links)


@dataclass(frozen=True)
class MaskFilling:
    """The `count` best fillings of the masks among tokens."""

    ids: Sequence[int]
    mask_id: int
    count: int

    def numbers(self) -> list[int]:
        return [len(self.ids), *self.ids, self.mask_id, self.count]

    @staticmethod
    def read(reader: NumberReader) -> "MaskFilling":
        return MaskFilling(reader.some(), reader.one(), reader.one())

    def run(self, model: Transformer, links: StageLinks = WHOLE) -> list[Filling]:
        return fill_masks(model, self.ids, self.mask_id, self.count, links)


KINDS = (TextScoring, Embedding, MaskFilling)


def work_numbers(work: ModelWork[object]) -> list[int]:
    return [KINDS.index(type(work)), *work.numbers()]


def read_work(reader: NumberReader) -> ModelWork[object]:
    """From what `work_numbers` has returned."""
    return KINDS[reader.one()].read(reader)
