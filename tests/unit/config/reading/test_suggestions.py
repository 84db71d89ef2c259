"""Which key an unknown one may have meant, and what of a value is shown."""

import pytest

from llmtrain.config.reading.rendering import is_secret, shown
from llmtrain.config.reading.suggestions import FAMILIAR_NAMES, all_keys, suggested_keys


@pytest.mark.parametrize(
    ("path", "guess"),
    [
        (("model", "num_head"), ["model.num_heads"]),
        (("model", "Hidden-Size"), ["model.hidden_size"]),
        (("train", "zero_stage"), ["engine.zero_stage"]),
        (("optim", "every_steps"), ["prune.every_steps", "evaluate.every_steps", "checkpoint.every_steps"]),
        (("data", "train", 0, "weigth"), ["data.train.0.weight"]),
        (("warmup_step",), ["optim.warmup_steps"]),
        (("train", "qqqq"), []),
    ],
)
def test_suggested_keys(path: tuple[str | int, ...], guess: list[str]) -> None:
    assert suggested_keys(path) == guess


def test_names_from_elsewhere_lead_to_keys_that_exist() -> None:
    assert set(FAMILIAR_NAMES.values()) <= set(all_keys())
    assert not FAMILIAR_NAMES.keys() & {key.rsplit(".", 1)[-1] for key in all_keys()}


@pytest.mark.parametrize(
    "name", ["token", "hf_token", "HF_TOKEN", "hfToken", "api_key", "apikey", "WANDB_API_KEY", "secret"]
)
def test_secrets(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize("name", ["tokens", "tokenizer", "num_tokens", "loss_chunk_tokens", "keep", "secretary"])
def test_no_secrets(name: str) -> None:
    assert not is_secret(name)


def test_no_key_of_the_schema_is_a_secret() -> None:
    assert not [key for key in all_keys() if is_secret(key.rsplit(".", 1)[-1])]


def test_values_are_shown_as_yaml() -> None:
    assert shown("a", True) == "true"
    assert shown("a", float("nan")) == ".nan"
    assert shown("a", None) == "null"
    assert shown("a", "x" * 500) == "x" * 77 + "..."


def test_secrets_are_not_shown_at_any_depth() -> None:
    assert "canary" not in shown("model", [{"auth": {"apiKey": "canary", "user": "me"}}])
    assert "canary" not in shown("hf_token.value", "canary")
