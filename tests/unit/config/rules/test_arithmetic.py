"""Each rule between keys: what breaks it, what does not, and that what it suggests is legal."""

import re
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llmtrain.config.reading.suggestions import nearest_divisors, nearest_multiples
from tests.unit.config.small_run import broken, run

VALID = {"valid": [{"path": "b"}]}


def test_the_base_run_breaks_no_rule() -> None:
    assert broken(run()) == {}


@pytest.mark.parametrize(
    ("sections", "key", "says"),
    [
        ({"name": "..."}, "name", "my-run"),
        ({"train": {"steps": None}}, "train", "train.steps, train.tokens or train.epochs"),
        ({"train": {"tokens": 5}}, "train.tokens", "Remove one"),
        ({"train": {"epochs": 5}}, "train.epochs", "Remove one"),
        ({"evaluate": {"metric": "accuracy"}}, "evaluate.metric", "model.head is classifier or token_classifier, and"),
        ({"model": {"num_heads": 6}}, "model.num_heads", "Try 1, 2, 4 or 8."),
        ({"model": {"num_kv_heads": 3}}, "model.num_kv_heads", "model.num_heads = 4"),
        ({"model": {"hidden_size": 12}}, "model.num_heads", "Try 1, 2, 3 or 6, or model.position=learned."),
        ({"model": {"hidden_size": 12, "head_dim": 3}}, "model.head_dim", "Try 2 or 4."),
        ({"model": {"position": "none", "rope_scaling": {}}}, "model.rope_scaling", "no effect"),
        ({"model": {"rope_scaling": {"low_freq_factor": 4.0}}}, "model.rope_scaling.low_freq_factor", "Try 1."),
        ({"data": {"seq_len": 129}}, "data.seq_len", "Try 128, or model.max_seq_len=129."),
        ({"optim": {"warmup_steps": 60, "decay_steps": 60}}, "optim.decay_steps", "greater than optim.warmup_steps"),
        ({"optim": {"lr": 1e-5}}, "optim.min_lr", "at most optim.lr = 1e-05. Try 1e-06."),
        ({"optim": {"loss_scale": {"minimum": 1e9}}}, "optim.loss_scale.initial", "optim.loss_scale.minimum"),
        ({"evaluate": {"every_steps": 5}}, "evaluate.every_steps", "data.valid"),
        ({"data": VALID, "checkpoint": {"keep_best": True}}, "checkpoint.keep_best", "evaluate.every_steps"),
        ({"train": {"global_batch_size": 10}}, "train.global_batch_size", "Try 8 or 12, or for train.micro_batch_size"),
        ({"train": {"global_batch_size": 2}}, "train.global_batch_size", "or for train.micro_batch_size 1 or 2."),
    ],
)
def test_rule_is_broken(sections: dict[str, Any], key: str, says: str) -> None:
    problems = broken(run(**sections))
    assert says in problems[key]


@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"steps": None, "tokens": 10**6}},
        {"model": {"num_heads": 6, "head_dim": 8, "num_kv_heads": 3}},
        {"model": {"hidden_size": 12, "position": "learned"}},
        {"model": {"attention_dropout": 0.1}, "train": {"compile": True, "recompute": "full"}},
        {"data": {"reset_positions": True, "reset_attention": True}},
        {"train": {"precision": "fp16"}, "launch": {"device": "cpu"}},
        {"optim": {"schedule": "wsd", "warmup_steps": 60, "decay_steps": 40}},
        {"train": {"steps": 20}, "optim": {"warmup_steps": 50}},
        {"train": {"steps": None, "tokens": 513}, "optim": {"warmup_steps": 2}},
        {"train": {"steps": 20}, "optim": {"schedule": "wsd", "warmup_steps": 10, "decay_steps": 40}},
        {"optim": {"schedule": "constant", "lr": 1e-6}},
        {"data": VALID, "evaluate": {"every_steps": 5}, "checkpoint": {"keep_best": True}},
    ],
)
def test_rules_allow(sections: dict[str, Any]) -> None:
    assert broken(run(**sections)) == {}


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 200))
def test_suggested_head_counts_are_legal(hidden_size: int, num_heads: int) -> None:
    sizes = {"hidden_size": hidden_size, "num_heads": num_heads}
    message = broken(run(model=sizes)).get("model.num_heads")
    assume(message is not None)
    tries = re.findall(r"\d+", str(message).split("Try")[1].split(", or model")[0])
    for legal in map(int, tries):
        position = "learned" if "divide" in str(message) else "rope"
        assert "model.num_heads" not in broken(run(model={**sizes, "num_heads": legal, "position": position}))


@settings(deadline=None)
@given(st.integers(1, 10**18), st.integers(1, 10**18))
def test_suggestions_for_absurd_numbers_are_found_at_once(number: int, value: int) -> None:
    assert all(number % divisor == 0 for divisor in nearest_divisors(number, value))
    assert all(multiple % number == 0 for multiple in nearest_multiples(number, value))


def test_total_steps_rounds_tokens_up() -> None:
    assert run(train={"steps": None, "tokens": 8 * 64 * 3}).total_steps == 3
    assert run(train={"steps": None, "tokens": 8 * 64 * 3 + 1}).total_steps == 4
