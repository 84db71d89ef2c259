"""Sections `quantize` that fit no model, no layout, or each other."""

from typing import Any

import pytest

from llmtrain.config.finetune import QuantizeConfig
from llmtrain.errors import ConfigError
from tests.unit.config.small_run import broken, run

TWO_TENSOR_RANKS: dict[str, Any] = {"parallel": {"tensor": 2}, "engine": {"name": "megatron"}}


@pytest.mark.parametrize(
    ("quantize", "others", "key", "says"),
    [
        ({"keep": ["attention.query"]}, {}, "quantize.keep.0", "fits no linear of the model's layers. Try"),
        ({"keep": ["head.weight"]}, {}, "quantize.keep.0", "The head, embeddings, norms and routers are never rounded"),
        ({"keep": ["attention", "mlp"]}, {}, "quantize.keep", "leaves nothing to round"),
        ({"scheme": "w8a8", "group": 16}, {}, "quantize.group", "With w8a8 each output has one scale. Try 0."),
        ({"scheme": "w4a16"}, {}, "quantize.group", "does not divide the 64 inputs that decoder.layers.0.attention.q"),
        ({"scheme": "w8a16", "group": 48}, {}, "quantize.group", "Try 64, 32, 16, 8 or 0"),
        ({"group": 64}, TWO_TENSOR_RANKS, "quantize.group", "has on each of 2 tensor ranks. Try 32, 16, 8 or 0"),
        ({}, {"train": {"precision": "fp8"}}, "train.precision", "quantize rounds them to whole numbers. Try bf16"),
        (
            {},
            {"parallel": {"pipeline": 2, "pipeline_schedule": "zero_bubble"}, "engine": {"name": "megatron"}},
            "parallel.pipeline_schedule",
            "which quantize rounds at once. Try null",
        ),
        (
            {"scheme": "w8a8"},
            {"finetune": {"method": "prompt"}},
            "quantize.scheme",
            "does not train, and not what",
        ),
    ],
)
def test_what_does_not_fit_is_explained(
    quantize: dict[str, Any], others: dict[str, dict[str, Any]], key: str, says: str
) -> None:
    model = {"ffn_hidden_size": 192, **others.get("model", {})}
    ranks = others.get("parallel", {})
    found = broken(
        run(**{**others, "model": model}).with_keys({"quantize": quantize}),
        ranks.get("tensor", 1) * ranks.get("pipeline", 1),
    )
    assert says in found[key]


def test_what_fits_is_let_through() -> None:
    model = {"ffn_hidden_size": 192}
    for quantize in ({}, {"scheme": "w8a8", "group": 0}, {"scheme": "w4a16", "group": 64, "keep": ["mlp.down"]}):
        assert broken(run(model=model).with_keys({"quantize": quantize})) == {}
    # What one scale of each output spans is no group; and a kept matrix need not be divided.
    assert broken(run(model=model, **TWO_TENSOR_RANKS).with_keys({"quantize": {"group": 0}}), 2) == {}
    wide = {"scheme": "w4a16", "group": 64, "keep": ["attention.out", "mlp.down"]}
    assert broken(run(model=model, **TWO_TENSOR_RANKS).with_keys({"quantize": wide}), 2) == {}


@pytest.mark.parametrize(
    "wrong",
    [{"scheme": "w2a16"}, {"scheme": 8}, {"group": -1}, {"group": 1.5}, {"group": 1 << 40}, {"keep": [3]}, {"bits": 4}],
)
def test_a_wrong_value_is_an_error(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        run().with_keys({"quantize": wrong})


def test_a_scheme_has_its_usual_group() -> None:
    groups = [QuantizeConfig(scheme="w4a16", group=group).numbers.group for group in (None, 0, 32)]
    assert groups == [128, None, 32] and QuantizeConfig().numbers.group is None
