"""Sections `prune` that fit no model, no layout, or each other; and the share that a schedule has pruned."""

from typing import Any

import pytest

from llmtrain.config.finetune import PruneConfig
from tests.unit.config.small_run import broken, run


@pytest.mark.parametrize(
    ("prune", "others", "key", "says"),
    [
        ({"targets": ["attention.query"]}, {}, "prune.targets.0", "fits no linear of the model's layers. Try"),
        ({"targets": ["embeddings.word"]}, {}, "prune.targets.0", "fits no linear"),
        ({"kind": "2:4", "sparsity": 0.7}, {}, "prune.sparsity", "no effect with prune.kind = 2:4. Remove it, or set"),
        ({"kind": "kept", "from_step": 5}, {}, "prune.from_step", "magnitude or 2:4"),
        ({"every_steps": 7}, {}, "prune.every_steps", "no effect without prune.until_step"),
        ({"from_step": 5, "until_step": 5}, {}, "prune.until_step", "must be more than prune.from_step = 5"),
        ({}, {"finetune": {"method": "lora"}}, "finetune.method", "trains what it adds"),
        ({}, {"optim": {"freeze": ["decoder.layers.0.*"]}}, "prune.targets", "which optim.freeze keeps"),
        (
            {"kind": "2:4"},
            {
                "model": {"ffn_hidden_size": 12, "activation": "gelu"},
                "parallel": {"tensor": 2},
                "engine": {"name": "megatron"},
            },
            "prune.kind",
            "has 6 of them on each of 2 tensor ranks",
        ),
        ({"kind": "2:4"}, {"model": {"ffn_hidden_size": 14, "activation": "gelu"}}, "prune.kind", "has 14 of them."),
    ],
)
def test_what_does_not_fit_is_explained(
    prune: dict[str, Any], others: dict[str, dict[str, Any]], key: str, says: str
) -> None:
    assert says in broken(run(**others).with_keys({"prune": prune}))[key]


def test_what_fits_is_let_through() -> None:
    for prune in ({"kind": "2:4", "from_step": 4}, {"kind": "kept"}, {"until_step": 9, "every_steps": 2}):
        assert broken(run().with_keys({"prune": prune})) == {}
    frozen = run(optim={"freeze": ["embeddings.*", "*.mlp.*"]})
    assert broken(frozen.with_keys({"prune": {"targets": ["attention"]}})) == {}


def test_a_schedule_rises_to_its_end_and_says_what_it_has_done() -> None:
    prune = PruneConfig(sparsity=0.8, from_step=10, until_step=50, every_steps=20)
    assert [step for step in range(1, 80) if prune.prunes_behind(step)] == [10, 30, 50]
    shares = [prune.sparsity_behind(step) for step in (9, 10, 29, 30, 49, 50, 70)]
    assert shares == [0.0, 0.0, 0.0, pytest.approx(0.8 * 0.875), pytest.approx(0.8 * 0.875), 0.8, 0.8]
    once = PruneConfig(kind="2:4", from_step=3)
    assert [step for step in range(1, 9) if once.prunes_behind(step)] == [3]
    assert [once.sparsity_behind(step) for step in (2, 3, 9)] == [0.0, 0.5, 0.5]
    assert [once.keeps_zeros(step) for step in (3, 4)] == [False, True]
    kept = PruneConfig(kind="kept")
    assert kept.keeps_zeros(1) and not any(kept.prunes_behind(step) for step in range(1, 9))
