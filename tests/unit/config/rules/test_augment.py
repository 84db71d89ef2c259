"""Augmentation where it makes no sense is refused with the reason."""

from typing import Any

import pytest

from llmtrain.config.data import AugmentConfig, ObjectiveName
from llmtrain.preflight.data_identity import stream_keys
from tests.unit.config.small_run import broken, run

T5: dict[str, Any] = {"family": "encoder_decoder", "position": "none"}
BERT: dict[str, Any] = {"family": "encoder", "position": "learned"}


@pytest.mark.parametrize("name", AugmentConfig.model_fields)
@pytest.mark.parametrize("objective", ["causal", "prefix", "fim"])
def test_a_decoder_takes_all_but_swaps(name: str, objective: ObjectiveName) -> None:
    problems = broken(run(data={"objective": objective, "augment": {name: 0.1}}))
    assert list(problems) == (["data.augment.swap_words"] if name == "swap_words" else [])
    assert all("it is to predict. Try 0, or data.augment.delete_words" in text for text in problems.values())


@pytest.mark.parametrize("name", AugmentConfig.model_fields)
def test_what_conversations_say_is_not_changed(name: str) -> None:
    problems = broken(run(data={"objective": "chat", "augment": {name: 0.1}}))
    assert (
        "turn by turn" in problems[f"data.augment.{name}"] and "llmtrain data chat" in problems[f"data.augment.{name}"]
    )


@pytest.mark.parametrize(("model", "objective"), [(BERT, "masked"), (T5, "span_corruption"), (T5, "prefix")])
def test_encoders_take_all(model: dict[str, Any], objective: str) -> None:
    augment = dict.fromkeys(AugmentConfig.model_fields, 0.1)
    assert broken(run(model=model, data={"objective": objective, "augment": augment})) == {}


@pytest.mark.parametrize("head", ["classifier", "token_classifier", "span"])
@pytest.mark.parametrize("model", [BERT, {}])
def test_texts_to_classify_take_all_and_what_is_told_by_its_places_none(model: dict[str, Any], head: str) -> None:
    augment = dict.fromkeys(AugmentConfig.model_fields, 0.1)
    problems = broken(run(model={**model, "head": head}, data={"objective": "labels", "augment": augment}))
    about = [text for key, text in problems.items() if key.startswith("data.augment")]
    assert len(about) == (0 if head == "classifier" else len(augment))
    assert all(f"model.head = {head}" in text for text in about)


def test_a_run_goes_on_with_the_noise_that_it_began_with() -> None:
    """Its samples are compared at a resume."""
    assert stream_keys(run().data) != stream_keys(run(data={"augment": {"drop_tokens": 0.1}}).data)
