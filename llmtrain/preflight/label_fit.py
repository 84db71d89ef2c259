"""A model with a head for labels and data that has some: what the data fills in, and where the two do not fit.

Imports no torch.
"""

from collections.abc import Iterator

from llmtrain.config.metrics import METRIC_TABLE
from llmtrain.config.model import ModelConfig
from llmtrain.config.reading.rendering import shown
from llmtrain.config.schema import RunConfig
from llmtrain.data.storage.manifest import Manifest
from llmtrain.data.storage.remote import shown_path
from llmtrain.data.storage.targets import LabelsRecord
from llmtrain.errors import Problem
from llmtrain.values.label_metrics import has_entities

HEADS = {"classification": "classifier", "tagging": "token_classifier", "qa": "span"}
"""The head for the labels of a task."""


LABEL_KEYS = ("model.num_labels", "model.labels")
"""What the data fills in."""


def with_labels(model: ModelConfig, manifest: Manifest | None) -> ModelConfig:
    """The model with number and names of the labels that it leaves to its data."""
    if model.head not in ("classifier", "token_classifier"):
        return model
    names = manifest.labels.names if manifest and manifest.labels else ()
    labels = model.labels or names or None
    return model.with_keys({"labels": labels, "num_labels": model.num_labels or len(labels or ()) or None})


def fill_labels(config: RunConfig, manifest: Manifest) -> RunConfig | list[Problem]:
    """The configuration with labels filled in. `manifest` is that of the first training source."""
    if not config.model.predicts_labels:
        return config
    path = shown_path(config.data.train[0].path)
    if manifest.labels is None:
        message = "has no labels, and model.head predicts some. Write it with `llmtrain data labels`."
        return [Problem("data.train.0.path", message, path, uses=("model.head",))]
    problems = list(_misfits(config.model, manifest.labels, path))
    filled = with_labels(config.model, manifest)
    if not problems and METRIC_TABLE[config.evaluate.metric].of_entities and not has_entities(filled):
        message = f"is of tags of entities, B- and I- before their kind, and {path} has no such labels. Try accuracy."
        problems = [Problem("evaluate.metric", message, config.evaluate.metric)]
    return problems or config.with_keys({"model.labels": filled.labels, "model.num_labels": filled.num_labels})


def _misfits(model: ModelConfig, record: LabelsRecord, path: str) -> Iterator[Problem]:
    if model.head != HEADS[record.task]:
        message = f"the labels of {path} are of {record.task}. Try {HEADS[record.task]}, or other data."
        yield Problem("model.head", message, model.head)
        return
    if model.family != record.family:
        message = f"the texts of {path} are framed for a model of family {record.family}. Try {record.family}, or "
        message += f"write them again with --family {model.family}."
        yield Problem("model.family", message, model.family)
    if record.task != "qa" and model.labels not in (None, record.names):
        message = f"the labels of {path} are {shown('labels', list(record.names))}. Remove it to take those."
        yield Problem("model.labels", message, shown("labels", list(model.labels or ())))
    elif record.task != "qa" and model.num_labels not in (None, len(record.names)):
        message = f"{path} has {len(record.names)} labels. Try {len(record.names)}, or null to take it from the data."
        yield Problem("model.num_labels", message, model.num_labels)
    if record.separator_id is not None and model.token_types == 1:
        message = f"{path} has pairs of texts, which token types tell apart. Try 2, or 0 for none."
        yield Problem("model.token_types", message, model.token_types)
