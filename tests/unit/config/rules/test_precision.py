"""What fp8 goes with: what is refused names the fix, and the fix is accepted."""

from typing import Any

import pytest

from tests.unit.config.small_run import broken, run

FP8 = {"precision": "fp8", "micro_batch_size": 2}
MODEL = {"hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "ffn_hidden_size": 96}
MEGATRON, DEEPSPEED = {"name": "megatron"}, {"name": "deepspeed"}
T5 = {"family": "encoder_decoder", "num_encoder_layers": 2, "position": "t5_relative", "num_kv_heads": 4}


def fp8(**sections: Any) -> dict[str, str]:
    model, train = {**MODEL, **sections.pop("model", {})}, {**FP8, **sections.pop("train", {})}
    return broken(run(model=model, train=train, **sections), world_size=2)


@pytest.mark.parametrize(
    ("sections", "key", "says"),
    [
        ({"launch": {"device": "cpu"}}, "train.precision", "needs a GPU, and launch.device = cpu. Try bf16."),
        ({"engine": MEGATRON, "parallel": {"tensor": 2}}, "train.precision", "Try bf16, or parallel.tensor=1."),
        ({"engine": MEGATRON, "parallel": {"context": 2}}, "train.precision", "Try bf16, or parallel.context=1."),
        (
            {"engine": MEGATRON, "parallel": {"pipeline": 2, "pipeline_schedule": "zero_bubble"}},
            "train.precision",
            "zero_bubble needs apart. Try bf16, or parallel.pipeline_schedule=null.",
        ),
        ({"engine": {**DEEPSPEED, "zero_stage": 3}}, "train.precision", "Try bf16, or engine.zero_stage 2, 1 or 0."),
        ({"model": {"hidden_size": 68}}, "model.hidden_size", "product of 68: train.precision = fp8 needs multiples"),
        ({"model": {"head_dim": 4}}, "model.num_kv_heads", "product of 8: train.precision = fp8 needs multiples of 16"),
        ({"model": {"ffn_hidden_size": 100}}, "model.ffn_hidden_size", "Try another size, or bf16."),
        (
            {"train": {"micro_batch_size": 3}, "data": {"seq_len": 8}},
            "train.micro_batch_size",
            "times sequences of 8 tokens is 24: train.precision = fp8 needs a multiple of 16. Try 2 or 4, or",
        ),
    ],
)
def test_what_it_does_not_go_with(sections: dict[str, Any], key: str, says: str) -> None:
    assert says in fp8(**sections)[key]


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"launch": {"device": "cuda"}, "train": {"compile": True}},
        {"engine": {**MEGATRON, "zero_stage": 1}, "parallel": {"pipeline": 2}},
        {"engine": {**DEEPSPEED, "zero_stage": 2}},
        {"train": {"recompute": "full"}},
        {"model": {"ffn_hidden_size": 100, "moe": {"num_experts": 4}}},
    ],
)
def test_what_it_goes_with(sections: dict[str, Any]) -> None:
    assert fp8(**sections) == {}


def test_both_sequences_of_an_encoder_decoder_fit() -> None:
    data = {"objective": "span_corruption", "seq_len": 32}
    found = fp8(model=T5, data=data, train={"micro_batch_size": 1})
    assert "needs a multiple of 16. Try 2" in found["train.micro_batch_size"]
    assert "train.micro_batch_size" not in fp8(model=T5, data=data, train={"micro_batch_size": 2})
