"""Sections `finetune` that fit no model, no data, or each other."""

from typing import Any

import pytest

from tests.unit.config.small_run import broken, run

MOE = {"num_experts": 4, "ffn_hidden_size": 48}


def lora(**keys: Any) -> dict[str, Any]:
    return {"method": "lora", "lora": keys}


@pytest.mark.parametrize(
    ("finetune", "others", "key", "says"),
    [
        (lora(targets=["attention.query"]), {}, "finetune.lora.targets.0", "fits no linear of the model's layers. Try"),
        (lora(targets=["atention"]), {}, "finetune.lora.targets.0", "Try attention;"),
        (lora(targets=["mlp", "experts"]), {}, "finetune.lora.targets.1", "the short names are attention, attention.q"),
        (lora(targets=["decoder.layers.99.*"]), {}, "finetune.lora.targets.0", "fits no linear"),
        (lora(targets=["*norm*"]), {}, "finetune.lora.targets.0", "fits no linear"),
        (lora(train_also=["decoder.norms.*"]), {}, "finetune.lora.train_also.0", "fits no parameter"),
        (lora(dropout=0.1), {"model": {"moe": MOE}}, "finetune.lora.dropout", "Set 0, or leave experts out"),
        (
            lora(rank=12),
            {"model": {"moe": MOE}, "train": {"precision": "bf16"}},
            "finetune.lora.rank",
            "must be a multiple of 8 for experts in bf16. Try 16.",
        ),
        ({"method": "full", "lora": {"rank": 4}}, {}, "finetune.lora", "has no effect with finetune.method = full"),
        ({**lora(), "adapter": {"size": 4}}, {}, "finetune.adapter", "Set finetune.method=adapter"),
        ({"method": "prompt", "prompt": {"init": "text"}}, {}, "finetune.prompt.text", "is missing"),
        ({"method": "prompt", "prompt": {"text": "a"}}, {}, "finetune.prompt.text", "has no effect with"),
        (
            {"method": "prompt"},
            {"data": {"reset_attention": True}},
            "finetune.method",
            "stands before a sample, and the documents in it do not see each other",
        ),
        (
            {"method": "prompt", "prompt": {"tokens": 100_000 // 2}},
            {},
            "data.seq_len",
            "- finetune.prompt.tokens = 50000",
        ),
        (lora(), {"optim": {"freeze": ["*"]}}, "optim.freeze", "nothing is left to train"),
    ],
)
def test_what_does_not_fit_is_explained(
    finetune: dict[str, Any], others: dict[str, dict[str, Any]], key: str, says: str
) -> None:
    assert says in broken(run(**others).with_keys({"finetune": finetune}))[key]


@pytest.mark.parametrize(
    ("finetune", "others"),
    [
        (lora(targets=["attention.q", "mlp", "decoder.layers.0.*"], train_also=["*norm*"], dropout=0.1), {}),
        (lora(targets=["attention"], dropout=0.1), {"model": {"moe": MOE}}),
        (lora(targets=["experts.up"]), {"model": {"moe": MOE}}),
        ({"method": "adapter", "adapter": {"placement": "both"}}, {}),
        ({"method": "prompt", "prompt": {"tokens": 4, "init": "text", "text": "Say it."}}, {}),
        ({"method": "full"}, {"optim": {"freeze": ["embeddings.*"]}}),
    ],
)
def test_what_fits_is_not_spoken_of(finetune: dict[str, Any], others: dict[str, dict[str, Any]]) -> None:
    assert broken(run(**others).with_keys({"finetune": finetune})) == {}
