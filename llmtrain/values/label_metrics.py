"""What an evaluation of a head for labels counts, and the metrics that follow from the sums over all ranks. Pure.

Counts add up over samples, ranks and batches, so that the metrics of every layout are the same.
"""

from collections.abc import Sequence

from llmtrain.config.metrics import METRIC_TABLE
from llmtrain.config.model import ModelConfig

LABEL_METRICS = tuple(name for name, row in METRIC_TABLE.items() if row.heads)
"""The names of all metrics of labels."""


def has_entities(model: ModelConfig) -> bool:
    """True where labels are tags of entities: B- and I- before their kind."""
    return model.head == "token_classifier" and any(label.startswith(("B-", "I-")) for label in model.labels or ())


def num_counts(model: ModelConfig) -> int:
    """How many numbers an evaluation counts beside the loss."""
    if not model.predicts_labels:
        return 0
    if model.head == "span":
        return 3
    return 3 * model.num_classes + (3 if has_entities(model) else 0)


def label_metrics(model: ModelConfig, counts: Sequence[float]) -> dict[str, float]:
    """The metrics by name, from the sums of what models/label_heads.py counts; none for a model of tokens."""
    if not model.predicts_labels:
        return {}
    if model.head == "span":
        exact, f1, number = counts
        return {"exact_match": exact / max(1.0, number), "token_f1": f1 / max(1.0, number)}
    size = model.num_classes
    right, predicted, meant = counts[:size], counts[size : 2 * size], counts[2 * size : 3 * size]
    # Over the labels that occur or were predicted, as scikit-learn does: one that nobody meant says nothing.
    scores = [_f1(*found) for found in zip(right, predicted, meant, strict=True) if found[1] or found[2]]
    # Each has one label, so micro-averaged precision, recall and F1 are the accuracy.
    metrics = {
        "accuracy": sum(right) / max(1.0, sum(meant)),
        "macro_f1": sum(scores) / max(1, len(scores)),
        "micro_f1": _f1(sum(right), sum(predicted), sum(meant)),
    }
    if has_entities(model):
        exact, found, there = counts[3 * size :]
        metrics["entity_precision"] = exact / found if found else 0.0
        metrics["entity_recall"] = exact / there if there else 0.0
        metrics["entity_f1"] = _f1(exact, found, there)
    return metrics


def _f1(right: float, predicted: float, meant: float) -> float:
    return 2 * right / (predicted + meant) if predicted + meant else 0.0
