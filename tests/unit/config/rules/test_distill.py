"""Sections `distill` that fit no model, no layout, or each other."""

from typing import Any

import pytest

from llmtrain.config.schema import RunConfig
from tests.support.samples import tiny_model
from tests.unit.config.small_run import broken, run


def taught(teacher: dict[str, Any] | None, others: dict[str, dict[str, Any]], **keys: Any) -> RunConfig:
    config = run(**others)
    model = None if teacher is None else config.model.with_keys(teacher)
    return config.with_keys({"distill": {"teacher": "runs/teacher", "model": model, **keys}})


@pytest.mark.parametrize(
    ("teacher", "others", "keys", "key", "says"),
    [
        ({"family": "encoder", "head": "mlm"}, {}, {}, "distill.teacher", "has model.family = encoder"),
        ({"vocab_size": 400}, {"model": {"vocab_size": 300}}, {}, "distill.teacher", "they must be the same ones"),
        (None, {"model": {"vocab_size": 300}}, {"top_k": 301}, "distill.top_k", "at most model.vocab_size = 300"),
        ({"max_seq_len": 8}, {}, {}, "data.seq_len", "has model.max_seq_len = 8"),
        (
            {"num_heads": 3, "num_kv_heads": 3, "head_dim": 8},
            {"parallel": {"tensor": 2}, "engine": {"name": "megatron"}},
            {},
            "distill.teacher",
            "cannot be split as the model is: parallel.tensor must divide model.num_heads = 3",
        ),
        (
            {"num_layers": 1},
            {"parallel": {"pipeline": 2}, "engine": {"name": "megatron"}},
            {},
            "distill.teacher",
            "cannot be split as the model is: parallel.pipeline",
        ),
        (None, {"finetune": {"method": "prompt"}}, {}, "finetune.method", "where the teacher has nothing"),
    ],
)
def test_what_does_not_fit_is_explained(
    teacher: dict[str, Any] | None, others: dict[str, dict[str, Any]], keys: dict[str, Any], key: str, says: str
) -> None:
    ranks = 2 if "parallel" in others else 1
    assert says in broken(taught(teacher, others, **keys), ranks)[key]


def test_context_ranks_hold_the_same_positions() -> None:
    """A ring of the student's is one of the teacher's too, however many heads it has."""
    parallel = {"parallel": {"context": 2, "context_exchange": "ring"}, "engine": {"name": "megatron"}}
    assert broken(taught({"num_heads": 4, "num_kv_heads": 4}, parallel), 2) == {}
    other = {"attention": {"kind": "sliding_window", "window": 4}}
    assert "context ranks hold other positions" in broken(taught(other, parallel), 2)["distill.teacher"]
    linear = {"attention": {"kind": "linear"}}
    assert "cannot be split as the model is" in broken(taught(linear, parallel), 2)["distill.teacher"]


def test_teachers_may_be_of_other_kinds() -> None:
    config = run(parallel={"tensor": 2, "sequence": True}, engine={"name": "megatron"})
    for keys in ({"moe": {"num_experts": 4}}, {"num_layers": 9, "norm": "layernorm", "position": "learned"}):
        assert broken(config.with_keys({"distill": {"teacher": "x", "model": config.model.with_keys(keys)}}), 2) == {}
    experts = run(model={"moe": {"num_experts": 4}}, parallel={"expert": 2}, engine={"name": "megatron"})
    dense = {"teacher": "x", "model": tiny_model(vocab_size=experts.model.vocab_size)}
    assert "distill.teacher" not in broken(experts.with_keys({"distill": dense, "launch.num_workers": 2}), 2)
