"""Keys of attention and positions: what would be ignored is refused, and what is suggested is accepted."""

from typing import Any

import pytest

from tests.unit.config.small_run import broken, run

WINDOW = {"kind": "sliding_window", "window": 16}
LINEAR = {"kind": "linear"}


@pytest.mark.parametrize(
    ("model", "key", "says"),
    [
        (
            {"attention": {"window": 8}},
            "model.attention.window",
            "has no effect with model.attention.kind = full. Try null, or model.attention.kind=sliding_window or longf",
        ),
        (
            {"attention": {**WINDOW, "stride": 8}},
            "model.attention.stride",
            "Try null, or model.attention.kind=strided.",
        ),
        ({"attention": {**WINDOW, "num_random": 3}}, "model.attention.num_random", "Try 2, or"),
        ({"attention": {**WINDOW, "num_global": 2}}, "model.attention.num_global", "kind=bigbird or longformer."),
        ({"attention": {"block_size": 32}}, "model.attention.block_size", "Try 64, or model.attention.kind=bigbird."),
        ({"attention": {"kind": "sliding_window"}}, "model.attention.kind", "Try model.attention.window=16."),
        ({"attention": {"kind": "longformer"}}, "model.attention.kind", "needs model.attention.window."),
        ({"attention": {"kind": "strided"}}, "model.attention.kind", "Try model.attention.stride=8."),
        ({"attention": {**LINEAR, "softcap": 30.0}}, "model.attention.softcap", "could be capped. Try null"),
        ({"attention": {**LINEAR, "sinks": True}}, "model.attention.sinks", "Try false, or"),
        ({"attention": {**LINEAR, "scale": 1.0}}, "model.attention.scale", "could be scaled. Try null"),
        ({"attention": LINEAR, "attention_dropout": 0.1}, "model.attention_dropout", "Try 0, or model.dropout=0.1."),
        ({"attention": LINEAR, "position": "alibi"}, "model.position", "Try rope or learned, or"),
        ({"attention": LINEAR, "position": "t5_relative"}, "model.position", "adds to scores"),
        ({"relative_buckets": 16}, "model.relative_buckets", "Try 32, or model.position=t5_relative."),
        (
            {"relative_max_distance": 64, "position": "alibi"},
            "model.relative_max_distance",
            "position = alibi. Try 128",
        ),
        (
            {"relative_buckets": 64, "relative_max_distance": 32, "position": "t5_relative"},
            "model.relative_max_distance",
            "must be more than half of model.relative_buckets = 64, distances below which have a class each. Try 256.",
        ),
        ({"rope_scaling": {"low_freq_factor": 4.0}}, "model.rope_scaling.low_freq_factor", "must be less than"),
        (
            {"rope_scaling": {"kind": "linear", "low_freq_factor": 2.0}},
            "model.rope_scaling.low_freq_factor",
            "has no effect with model.rope_scaling.kind = linear. Try 1.0, or model.rope_scaling.kind=llama3.",
        ),
        ({"rope_scaling": {"beta_fast": 16.0}}, "model.rope_scaling.beta_fast", "model.rope_scaling.kind=yarn."),
        ({"rope_scaling": {"kind": "yarn", "beta_slow": 32.0}}, "model.rope_scaling.beta_slow", "Try 1."),
        (
            {"rope_scaling": {"kind": "ntk", "original_max_seq_len": 64}},
            "model.rope_scaling.original_max_seq_len",
            "Try 8192, or model.rope_scaling.kind=llama3 or yarn.",
        ),
        ({"rope_scaling": {"kind": "ntk"}, "head_dim": 2}, "model.rope_scaling.kind", "more than one pair"),
    ],
)
def test_what_would_be_ignored_is_refused(model: dict[str, Any], key: str, says: str) -> None:
    assert says in broken(run(model=model))[key]


@pytest.mark.parametrize(
    ("model", "data", "key", "says"),
    [
        ({"position": "alibi"}, {"reset_positions": True}, "data.reset_positions", "or data.reset_attention=true."),
        ({"position": "t5_relative"}, {"reset_positions": True}, "data.reset_positions", "knows distances alone"),
        (
            {"position": "none"},
            {"reset_positions": True, "reset_attention": True},
            "data.reset_positions",
            "Try false.",
        ),
        ({"attention": LINEAR}, {"objective": "prefix"}, "model.attention.kind", "Try full, or data.objective=causal."),
    ],
)
def test_what_does_not_go_with_the_data(model: dict[str, Any], data: dict[str, Any], key: str, says: str) -> None:
    assert says in broken(run(model=model, data=data))[key]


@pytest.mark.parametrize(
    ("model", "data"),
    [
        ({"attention": {**WINDOW, "softcap": 30.0, "sinks": True, "scale": 0.5}, "attention_dropout": 0.1}, {}),
        ({"attention": {"kind": "longformer", "window": 8, "num_global": 2}, "position": "alibi"}, {}),
        ({"attention": {"kind": "bigbird", "block_size": 8, "num_global": 2, "num_random": 1}, "qk_norm": True}, {}),
        ({"attention": {"kind": "strided", "stride": 8}, "position": "t5_relative", "relative_buckets": 16}, {}),
        ({"attention": LINEAR, "dropout": 0.1, "qk_norm": True}, {"reset_attention": True, "reset_positions": True}),
        ({"position": "alibi"}, {"reset_attention": True, "reset_positions": True}),
        ({"rope_scaling": {"kind": "yarn", "beta_fast": 16.0, "attention_factor": 1.2}}, {"reset_positions": True}),
        ({"rope_scaling": {"kind": "ntk", "factor": 4.0}}, {}),
        ({"rope_scaling": {"low_freq_factor": 2.0, "original_max_seq_len": 64}}, {}),
    ],
)
def test_what_goes_together(model: dict[str, Any], data: dict[str, Any]) -> None:
    assert broken(run(model=model, data=data)) == {}


def test_a_scale_with_linear_attention_is_cross_attentions_in_two_stacks() -> None:
    found = broken(run(model={"attention": {**LINEAR, "scale": 1.0}, "family": "encoder_decoder"}))
    assert "model.attention.scale" not in found
