"""A model of labels and its data: what is filled in, and what does not fit, each with its reason."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.config.schema import RunConfig
from llmtrain.data.storage.targets import LabelsRecord
from llmtrain.errors import ConfigError
from llmtrain.preflight.resolve import resolve
from tests.support.datasets import random_documents, write_dataset, write_target_dataset

RECORD = LabelsRecord("classification", ("code", "result", "use"), separator_id=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labels")
    write_target_dataset(folder / "labels", [[(np.arange(6, 12), np.array([n % 3])) for n in range(9)]], RECORD)
    write_target_dataset(folder / "answers", [[(np.arange(6, 12), np.array([1, 2]))]], LabelsRecord("qa"))
    write_dataset(folder / "texts", [random_documents(5)])
    return folder


def test_entities_are_measured_where_labels_are_tags_of_some(folder: Path) -> None:
    for names, fits in ((("O", "B-name", "I-name"), True), (("noun", "verb"), False)):
        path = folder / f"tags-{len(names)}"
        write_target_dataset(path, [[(np.arange(6, 9), np.array([0, 1, 0]))]], LabelsRecord("tagging", names))
        config = config_of(folder, path.name, head="token_classifier", token_types=0)
        config = config.with_keys({"evaluate.metric": "entity_f1"})
        if fits:
            assert resolve(config).config.model.labels == names
        else:
            with pytest.raises(ConfigError, match=r"evaluate.metric = entity_f1: is of tags of entities.*Try accuracy"):
                resolve(config)


def config_of(folder: Path, data: str = "labels", **keys: Any) -> RunConfig:
    model = {"family": "encoder", "position": "learned", "token_types": 2, "head": "classifier", "max_seq_len": 64}
    tree = {"name": "run", "model": {**model, **keys}, "output_dir": str(folder / "runs"), "train": {"steps": 1},
            "data": {"train": [{"path": str(folder / data)}], "objective": "labels", "seq_len": 16}}  # fmt: skip
    return RunConfig.model_validate(tree)


def test_number_and_names_of_labels_come_from_the_data(folder: Path) -> None:
    model = resolve(config_of(folder)).config.model
    assert (model.labels, model.num_labels, model.num_classes) == (RECORD.names, 3, 3)
    again = config_of(folder, labels=list(RECORD.names), num_labels=3)
    assert resolve(again).config.model == model
    span = resolve(config_of(folder, "answers", head="span")).config.model
    assert (span.labels, span.num_labels, span.num_classes) == (None, None, 2)


@pytest.mark.parametrize(
    ("data", "keys", "says"),
    [
        ("labels", {"head": "token_classifier"}, "labels are of classification. Try classifier, or other data."),
        ("answers", {}, "answers are of qa. Try span, or other data."),
        ("labels", {"num_labels": 5}, "has 3 labels. Try 3, or null to take it from the data."),
        ("labels", {"labels": ["a", "b", "c"]}, "Remove it to take those."),
        ("labels", {"token_types": 1}, "has pairs of texts, which token types tell apart. Try 2, or 0 for none."),
        ("labels", {"family": "decoder"}, "framed for a model of family encoder. Try encoder, or write them again"),
        ("texts", {}, "has no labels, and model.head predicts some. Write it with `llmtrain data labels`."),
    ],
)
def test_what_does_not_fit_is_refused(folder: Path, data: str, keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        resolve(config_of(folder, data, **keys))
    assert says in str(refused.value)
