"""The metrics of evaluations, one table: which models have each, and whether more is better. Pure."""

from dataclasses import dataclass
from typing import Literal

MetricName = Literal[
    "loss", "accuracy", "macro_f1", "micro_f1", "entity_precision", "entity_recall", "entity_f1", "exact_match",
    "token_f1",
]  # fmt: skip


@dataclass(frozen=True)
class MetricRow:
    """A metric is measured of models with one of `heads` (none named: of every model), with `of_entities` where their
    labels are tags of entities. `rises`: more is better."""

    heads: tuple[str, ...] = ()
    rises: bool = True
    of_entities: bool = False


_CLASSES, _TAGS = ("classifier", "token_classifier"), ("token_classifier",)

METRIC_TABLE: dict[MetricName, MetricRow] = {
    "loss": MetricRow(rises=False),
    "accuracy": MetricRow(_CLASSES),
    "macro_f1": MetricRow(_CLASSES),
    "micro_f1": MetricRow(_CLASSES),
    "entity_precision": MetricRow(_TAGS, of_entities=True),
    "entity_recall": MetricRow(_TAGS, of_entities=True),
    "entity_f1": MetricRow(_TAGS, of_entities=True),
    "exact_match": MetricRow(("span",)),
    "token_f1": MetricRow(("span",)),
}
"""Rows of evaluations have them behind `valid_`."""


def row_of_metric(name: object) -> MetricRow | None:
    """The row of a name that a file gives; None where there is no such metric."""
    return next((row for known, row in METRIC_TABLE.items() if known == name), None)


def titled(name: str) -> str:
    """A metric's name as pages show it: Macro F1."""
    return name.replace("_", " ").replace("f1", "F1")[:1].upper() + name.replace("_", " ").replace("f1", "F1")[1:]
