"""The table of metrics says what is measured of a model with each head, and no more."""

from typing import get_args

import pytest

from llmtrain.config.metrics import METRIC_TABLE, MetricName, row_of_metric
from llmtrain.config.model import ModelConfig
from llmtrain.values.label_metrics import LABEL_METRICS, has_entities, label_metrics, num_counts


@pytest.mark.parametrize("labels", [("O", "B-x"), ("a", "b"), None])
@pytest.mark.parametrize("head", ["linear", "mlm", "classifier", "token_classifier", "span"])
def test_the_table_is_what_is_measured(head: str, labels: tuple[str, ...] | None) -> None:
    given = {"head": head, "labels": labels} if "classifier" in head else {"head": head}
    model = ModelConfig.model_validate({"family": "encoder", **given, **({"num_labels": 2} if labels else {})})
    if "classifier" in head and labels is None:
        return
    measured = label_metrics(model, [1.0] * num_counts(model))
    told = [
        name for name, row in METRIC_TABLE.items() if head in row.heads and (has_entities(model) or not row.of_entities)
    ]
    assert list(measured) == told


def test_every_name_has_a_row_and_the_loss_alone_falls() -> None:
    assert get_args(MetricName) == tuple(METRIC_TABLE) == ("loss", *LABEL_METRICS)
    assert [name for name, row in METRIC_TABLE.items() if not row.rises] == ["loss"]
    assert row_of_metric("accuracy") is METRIC_TABLE["accuracy"]
    assert row_of_metric("speed") is row_of_metric(["loss"]) is row_of_metric(None) is None
