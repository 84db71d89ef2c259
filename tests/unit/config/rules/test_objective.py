"""Rules of objectives: what breaks them, what does not, and that what they suggest is legal."""

import re
from typing import Any

import pytest

from llmtrain.config.data import DataConfig
from llmtrain.config.rules.objective import FAMILIES
from llmtrain.config.schema import RunConfig
from llmtrain.config.sequence_lengths import num_sentinels, sample_lengths
from tests.unit.config.small_run import broken, run

T5 = {"family": "encoder_decoder"}


def objective(name: str, **keys: Any) -> RunConfig:
    """A run of an objective, in the first family that learns it."""
    return run(model={"family": FAMILIES[name][0], **head_for(name)}, data={"objective": name, **keys})


def head_for(name: str) -> dict[str, Any]:
    return {"head": "classifier", "num_labels": 3} if name == "labels" else {}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_objective_has_a_family(name: str) -> None:
    for family in FAMILIES[name]:
        assert broken(run(model={"family": family, **head_for(name)}, data={"objective": name})) == {}
    for family in {"decoder", "encoder", "encoder_decoder"} - set(FAMILIES[name]):
        message = broken(run(model={"family": family}, data={"objective": name}))["data.objective"]
        tries = message.split("Try ")[1].split(", or model.family")[0]
        for fitting in re.split(", | or ", tries):
            assert broken(run(model={"family": family, **head_for(fitting)}, data={"objective": fitting})) == {}


def test_the_default_objective_names_those_of_the_family() -> None:
    message = broken(run(model={"family": "encoder"}))["data.objective"]
    assert message == "trains model.family = decoder, not encoder. Try masked, or model.family=decoder."
    message = broken(run(model=T5))["data.objective"]
    assert "Try span_corruption, ul2 or prefix" in message


@pytest.mark.parametrize(
    ("config", "key", "says"),
    [
        (run(data={"masked": {"unit": "word"}}), "data.masked.unit", "set data.objective=masked"),
        (objective("masked", fim={"rate": 0.9}), "data.fim.rate", "no effect with data.objective = masked"),
        (run(data={"span_corruption": {"density": 0.3}}), "data.span_corruption.density", "objective=span_corruption"),
        (run(data={"ul2": {"denoisers": [{}]}}), "data.ul2.denoisers", "data.objective=ul2"),
        (run(data={"prefix": {"min_share": 0.3}}), "data.prefix.min_share", "data.objective=prefix"),
        (run(data={"special_tokens": {"mask": 3}}), "data.special_tokens.mask", "which uses none"),
        (objective("prefix", special_tokens={"pad": 3}), "data.special_tokens.pad", "which uses none"),
        (objective("masked", masked={"max_span": 5}), "data.masked.max_span", "data.masked.unit = token"),
        (objective("masked", masked={"mask_share": 0.95}), "data.masked.random_share", "Try 0.05 or less."),
        (objective("prefix", prefix={"min_share": 0.8}), "data.prefix.min_share", "data.prefix.max_share = 0.75"),
        (
            objective("ul2", ul2={"denoisers": [{}, {"kind": "prefix", "mean_length": 8.0}]}),
            "data.ul2.denoisers.1.mean_length",
            "takes out one span",
        ),
        (run(model=T5, data={"objective": "prefix", "reset_attention": True}), "data.reset_attention", "all documents"),
        (objective("ul2", reset_positions=True), "data.reset_positions", "Try false."),
        (objective("span_corruption", seq_len=1), "data.seq_len", "at least 2"),
        (objective("span_corruption", special_tokens={"sentinels": [9, 8]}), "data.special_tokens.sentinels", "uses 3"),
        (objective("fim", special_tokens={"sentinels": [7, 8, 7]}), "data.special_tokens.sentinels", "7 has another"),
        (
            objective("span_corruption", special_tokens={"sentinels": [7, 8, 9], "pad": 9}),
            "data.special_tokens.sentinels",
            "9 has another",
        ),
        (
            objective("ul2", ul2={"denoisers": [{"mode_token": 2}]}),
            "data.ul2.denoisers.0.mode_token",
            "have up to 3. Try 3 or more",
        ),
    ],
)  # fmt: skip
def test_rule_is_broken(config: RunConfig, key: str, says: str) -> None:
    problems = broken(config)
    assert says in problems[key], problems


@pytest.mark.parametrize(
    "config",
    [
        objective("masked", masked={"unit": "span", "max_span": 5}, reset_attention=True, reset_positions=True),
        objective("masked", masked={"mask_share": 0.9, "random_share": 0.1}, special_tokens={"mask": 5}),
        objective("prefix", prefix={"min_share": 0.5, "max_share": 0.5}, reset_attention=True),
        objective("fim", reset_attention=True, special_tokens={"sentinels": [7, 8, 9]}),
        objective("span_corruption", special_tokens={"sentinels": [7, 8, 9], "pad": 0}),
        objective("ul2", ul2={"denoisers": [{"mode_token": 3}, {"kind": "prefix"}]}),
    ],
)
def test_rules_allow(config: RunConfig) -> None:
    assert broken(config) == {}


def test_lengths_of_both_stacks_must_fit_the_model() -> None:
    """A window of 150 tokens gives the encoder 150 - 22 + 7 + 1 = 136."""
    base = {"objective": "span_corruption", "seq_len": 150}
    message = broken(run(model=T5, data=base))["data.seq_len"]
    assert "sequences of 136 tokens for the encoder and 32 for the decoder, and model.max_seq_len = 128" in message
    assert "model.max_seq_len=136" in message
    seq_len = int(re.findall(r"data.seq_len=(\d+)", message)[0])
    assert seq_len < 150 and broken(run(model=T5, data={**base, "seq_len": seq_len})) == {}
    assert "data.seq_len" in broken(run(model=T5, data={**base, "seq_len": seq_len + 1}))
    assert broken(run(model={**T5, "max_seq_len": 136}, data=base)) == {}
    assert broken(run(model=T5, data={**base, "seq_len": 140})) == {}, "the window itself may be longer than the model"


def test_axes_divide_the_sequences_that_objectives_make() -> None:
    """Windows of 64 give 64 + 16 tokens: 8 context ranks divide both, 16 do not."""
    engine = {"name": "megatron"}
    model = {**T5, "num_heads": 16, "hidden_size": 128, "max_seq_len": 512}
    data = {"objective": "span_corruption", "seq_len": 80}
    config = run(model=model, data=data, parallel={"context": 16}, engine=engine, launch={"num_workers": 16})
    lengths = sample_lengths("encoder_decoder", config.data)
    assert (lengths.main, lengths.encoder) == (24, 80)
    message = broken(config, 16)["data.seq_len"]
    assert (
        "of 80 tokens for the encoder and 24 for the decoder, which must be multiples of parallel.context = 16"
        in message
    )
    tries = [int(number) for number in re.findall(r"\d+", message.split("Try ")[1])]
    assert len(tries) == 2 and tries[0] < 80 < tries[1]
    for seq_len in tries:
        fitting = run(
            model=model, data={**data, "seq_len": seq_len}, parallel={"context": 16}, engine=engine,
            launch={"num_workers": 16},
        )  # fmt: skip
        assert "data.seq_len" not in broken(fitting, 16)
    eight = run(model=model, data=data, parallel={"context": 8}, engine=engine, launch={"num_workers": 8})
    assert "data.seq_len" not in broken(eight, 8)


def test_sentinels_are_counted() -> None:
    def count(**keys: Any) -> int:
        return num_sentinels(DataConfig.model_validate({"train": [{"path": "a"}], **keys}))

    assert count(objective="span_corruption", seq_len=568) == 28
    assert count(objective="ul2", seq_len=512) == 100, "its modes are the last of a hundred"
    assert count(objective="ul2", seq_len=1024) == 171
    assert (count(objective="fim"), count(objective="masked")) == (3, 0)
    problems = broken(run(model={**T5, "max_seq_len": 2048}, data={"objective": "ul2", "seq_len": 1024}))
    assert "Try 171 or more" in problems["data.ul2.denoisers.0.mode_token"]
