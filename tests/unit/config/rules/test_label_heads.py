"""Rules of heads for labels: what breaks them, and what they suggest."""

from typing import Any

import pytest

from tests.unit.config.small_run import broken, run

ENCODER = {"family": "encoder", "head": "classifier", "num_labels": 3}
LABELS = {"objective": "labels"}
SPAN = {"family": "encoder", "head": "span"}
PROMPT = {"finetune": {"base": "x", "method": "prompt", "prompt": {"tokens": 4}}}


@pytest.mark.parametrize(
    ("model", "data", "key", "says"),
    [
        (ENCODER, {"objective": "masked"}, "model.head", "predicts labels, and data.objective = masked has none"),
        ({"head": "linear"}, LABELS, "model.head", "predicts tokens, and data.objective = labels wants labels"),
        ({**ENCODER, "family": "encoder_decoder"}, LABELS, "model.head", "reads it in two. Try model.family=encoder"),
        ({"head": "span"}, LABELS, "model.head", "a decoder's do not. Try classifier or token_classifier"),
        ({"num_labels": 3}, {}, "model.num_labels", "has no effect with model.head = linear. Remove it"),
        ({**SPAN, "head_dropout": 0.1}, LABELS, "model.head_dropout", "has no effect with model.head = span"),
        ({**ENCODER, "labels": ["a", "b"]}, LABELS, "model.num_labels", "the number of model.labels, 2. Try 2 or null"),
        (
            {**ENCODER, "labels": ["a", "b", "a"]},
            LABELS,
            "model.labels",
            "has a twice. Each label must have one number",
        ),
        ({**ENCODER, "scaled_head": True}, LABELS, "model.scaled_head", "scales what meets a vocabulary"),
        (ENCODER, {**LABELS, "packing": "best_fit"}, "data.packing", "labels"),
        (ENCODER, {**LABELS, "packing": "none"}, "data.packing", "would cut documents"),
        ({}, {"labels": {"too_long": "drop"}}, "data.labels.too_long", "set data.objective=labels"),
    ],
)
def test_what_does_not_go_together_is_refused(model: dict[str, Any], data: dict[str, Any], key: str, says: str) -> None:
    assert says in broken(run(model=model, data=data))[key]


def test_answers_have_no_prompt() -> None:
    config = run(model={**SPAN, "max_seq_len": 2048}, data=LABELS).with_keys(PROMPT)
    assert "looks for positions in it. Try lora, adapter or full." in broken(config)["finetune.method"]
    assert "finetune.method" not in broken(run(model={**ENCODER, "max_seq_len": 2048}, data=LABELS).with_keys(PROMPT))


def test_whoever_has_all_of_it_breaks_nothing() -> None:
    for model in (ENCODER, SPAN, {"head": "classifier"}, {**ENCODER, "head": "token_classifier", "head_dropout": 0.2}):
        assert broken(run(model=model, data=LABELS)) == {}
