"""Heads for labels in Hugging Face's form: the classes, their names of our modules, and the keys of a configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from llmtrain.config.model import ModelConfig
from llmtrain.interop.name_table import Row, Table

AUTO_CLASSES: dict[str, Any] = {
    "classifier": AutoModelForSequenceClassification,
    "token_classifier": AutoModelForTokenClassification,
    "span": AutoModelForQuestionAnswering,
}
"""By model.head."""

UNNAMED = "LABEL_"
"""transformers calls labels so that have no names."""


@dataclass(frozen=True)
class ClassNames:
    """What the classes of a family begin with, and the head's module by model.head; families have no others."""

    prefix: str
    modules: Mapping[str, str]

    def table(self, head: str) -> Table:
        """The rows of a head for labels."""
        if head not in self.modules:
            return ()
        ours = "span" if head == "span" else "classifier"
        pooler = (Row("pooler.dense", "bert.pooler.dense"),) if self.prefix == "Bert" else ()
        return (*pooler, Row(ours, self.modules[head]))

    def heads(self) -> tuple[str, ...]:
        """Beginnings of the names of tensors that have no prefix."""
        return tuple(f"{module}." for module in self.modules.values())


SUFFIXES = {
    "classifier": "ForSequenceClassification",
    "token_classifier": "ForTokenClassification",
    "span": "ForQuestionAnswering",
}
BERT_HEADS = ClassNames("Bert", {"classifier": "classifier", "token_classifier": "classifier", "span": "qa_outputs"})
GPT2_HEADS = ClassNames("GPT2", {"classifier": "score", "token_classifier": "classifier"})
NO_HEADS = ClassNames("", {})


def decoder_heads(prefix: str) -> ClassNames:
    """Of Llama and what is made as it is."""
    return ClassNames(prefix, {"classifier": "score", "token_classifier": "score"})


def head_of(config: Any, names: ClassNames) -> str | None:
    """The head for labels that a configuration names by its class; None where it is for tokens."""
    classes = getattr(config, "architectures", None) or ()
    return next((head for head in names.modules if f"{names.prefix}{SUFFIXES[head]}" in classes), None)


def label_fields(config: Any, names: ClassNames) -> tuple[dict[str, Any], list[str]]:
    """The fields of a ModelConfig that a configuration's head for labels has, and what llmtrain cannot express."""
    head = head_of(config, names)
    if head is None:
        return {}, []
    if head == "span":
        return {"head": head}, [] if config.num_labels == 2 else [f"num_labels {config.num_labels}, not 2"]
    by_number = {int(number): str(name) for number, name in (config.id2label or {}).items()}
    labels = tuple(by_number[number] for number in sorted(by_number))
    against = []
    if sorted(by_number) != list(range(len(labels))) or len(labels) < 2:
        against.append(f"id2label {by_number}: labels are numbered from 0 on, and there are two at least")
    kind = getattr(config, "problem_type", None)
    if kind not in (None, "single_label_classification"):
        against.append(f"problem_type {kind}, not single_label_classification")
    named = not all(label == f"{UNNAMED}{number}" for number, label in enumerate(labels))
    fields = {"head": head, "num_labels": len(labels), "labels": labels if named else None}
    dropout = getattr(config, "classifier_dropout", None)
    return {**fields, **({} if dropout is None else {"head_dropout": float(dropout)})}, against


def add_labels(config: Any, model: ModelConfig, names: ClassNames) -> Any:
    """Write a head for labels into a configuration of a family that has it."""
    if model.head not in names.modules:
        return config
    config.architectures = [f"{names.prefix}{SUFFIXES[model.head]}"]
    if model.head == "span":
        return config
    labels = model.labels or [f"{UNNAMED}{number}" for number in range(model.num_classes)]
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    if model.head == "classifier":
        config.problem_type = "single_label_classification"
    if names.prefix == "Bert" or model.head == "token_classifier":
        config.classifier_dropout = model.label_dropout
    return config
