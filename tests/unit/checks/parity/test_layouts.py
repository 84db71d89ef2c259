from functools import reduce
from typing import Any

import pytest
import torch

from llmtrain.checks.parity.layouts import (
    SHRUNK_SEQ_LEN,
    STEADY_LR,
    iter_candidates,
    own_candidate,
    parse_candidate,
    shrink,
    shrunk_split,
)
from llmtrain.config.attention import ATTENTION_KINDS
from llmtrain.config.finetune import LoraConfig
from llmtrain.config.rules.arithmetic import arithmetic_problems
from llmtrain.errors import ConfigError
from llmtrain.models.attention.patterns import PATTERNS
from llmtrain.optim.table import OPTIMIZERS
from tests.support.samples import tiny_model, tiny_run
from tests.unit.config.small_run import run


def lora(**keys: Any) -> dict[str, Any]:
    return {"method": "lora", "lora": {"rank": 4, **keys}}


SMALL = shrink(tiny_run(tiny_model(num_layers=32, num_heads=32, num_kv_heads=8, hidden_size=4096)), "fp32")


def test_a_shrunk_model_keeps_kinds_and_head_ratio() -> None:
    assert (SMALL.model.num_heads, SMALL.model.num_kv_heads) == (4, 1)
    assert SMALL.model.norm == "rmsnorm"
    assert arithmetic_problems(SMALL, 1) == []


@pytest.mark.parametrize(("given", "compared"), [("relu", "gelu"), ("reglu", "geglu"), ("swiglu", "swiglu")])
def test_a_shrunk_model_has_no_activation_with_a_kink(given: str, compared: str) -> None:
    assert shrink(tiny_run(tiny_model(activation=given)), "fp32").model.activation == compared


@pytest.mark.parametrize(
    ("name", "given", "compared"), [("adamw", 1e-8, 1e-6), ("adamw", 1e-5, 1e-5), ("lion", 1e-8, 1e-8)]
)
def test_a_shrunk_run_makes_no_visible_step_of_rounding(name: str, given: float, compared: float) -> None:
    small = shrink(tiny_run(optim={"name": name, "eps": given}), "fp32")
    assert small.optim.eps == compared
    assert arithmetic_problems(small, 1) == []


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_shrunk_run_has_a_rate_of_its_optimizer(name: str) -> None:
    rates = [shrink(tiny_run(optim={"name": name, "lr": lr}), "fp32").optim.lr for lr in (1.0, 1e-9)]
    assert rates == [STEADY_LR[name], 1e-9]


@pytest.mark.parametrize(("kind", "block_size"), [("full", 64), ("bigbird", 4)])
def test_only_a_pattern_that_is_in_use_is_shrunk(kind: str, block_size: int) -> None:
    small = shrink(tiny_run(tiny_model(attention={"kind": kind})), "fp32")
    assert small.model.attention.block_size == block_size
    assert arithmetic_problems(small, 1) == []


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_a_shrunk_pattern_leaves_something_out_of_the_short_samples(kind: str) -> None:
    """So that a comparison of layouts would notice another pattern."""
    sizes = {key: suggested(4096) for key, suggested in ATTENTION_KINDS[kind].required.items()}
    small = shrink(tiny_run(tiny_model(attention={"kind": kind, **sizes})), "fp32")
    rule = PATTERNS[small.model.attention.kind](small.model.attention).rule(small.data.seq_len, torch.device("cpu"))
    s, t = torch.arange(small.data.seq_len)[:, None], torch.arange(small.data.seq_len)
    assert rule is None if kind in ("full", "linear") else rule is not None and not rule(s, t)[t <= s].all()


LAST = "decoder.layers.30.*"
NORMS = "decoder.layers.30.attention_norm.*"


@pytest.mark.parametrize(
    ("sections", "key", "left"),
    [
        ({"prune": {"targets": [LAST, "mlp.down"]}}, "prune.targets", ("mlp.down",)),
        ({"prune": {"targets": [LAST], "from_step": 900, "until_step": 990}}, "prune.targets", ("attention", "mlp")),
        ({"prune": {"kind": "2:4", "targets": [LAST], "from_step": 900}}, "prune.from_step", 1),
        ({"prune": {"kind": "kept", "targets": [LAST]}}, "prune.targets", ("attention", "mlp")),
        ({"finetune": lora(targets=[LAST, "attention.q"])}, "finetune.lora.targets", ("attention.q",)),
        ({"finetune": lora(targets=[LAST])}, "finetune.lora.targets", LoraConfig().targets),
        ({"finetune": lora(train_also=[NORMS, "*norm*"])}, "finetune.lora.train_also", ("*norm*",)),
        ({"finetune": {"method": "prompt", "prompt": {"tokens": 60}}}, "finetune.prompt.tokens", SHRUNK_SEQ_LEN),
        ({"quantize": {"scheme": "w8a16", "keep": [LAST, "mlp.down"]}}, "quantize.keep", ("mlp.down",)),
        ({"optim": {"freeze": [LAST, "*norm*"]}}, "optim.freeze", ("*norm*",)),
    ],
)
def test_what_a_shrunk_model_has_no_room_for_is_left_out(sections: dict[str, Any], key: str, left: Any) -> None:
    whole = tiny_run(tiny_model(num_layers=32, max_seq_len=128)).with_keys({"train.steps": 1000}).with_keys(sections)
    assert arithmetic_problems(whole, 1) == []
    small = shrink(whole, "fp32")
    assert arithmetic_problems(small, 1) == []
    assert reduce(getattr, key.split("."), small) == left


def test_every_candidate_is_legal_and_its_name_reads_back() -> None:
    small = shrink(tiny_run(), "fp32")
    candidates = list(iter_candidates(small, 2))
    names = [candidate.name for candidate in candidates]
    assert len(set(names)) == len(names)
    wanted = {"torch:dp1", "torch:dp2", "megatron:tp2", "megatron:tp2+sp+zero1", "megatron:pp2+vp2", "megatron:cp2"}
    wanted |= {"megatron:cp2+ring", "deepspeed:cp2+ring+zero3"}
    wanted |= {"megatron:pp2+zb", "megatron:pp2+zb+zero1"}
    assert wanted <= set(names)
    for candidate in candidates:
        again = parse_candidate(candidate.name, small)
        assert again == candidate


@pytest.mark.parametrize("text", ["tp", "megatron:xx2", "other:tp2", "tp2++sp", ""])
def test_a_text_that_names_no_layout_shows_the_form(text: str) -> None:
    with pytest.raises(ConfigError, match="PART"):
        parse_candidate(text, SMALL)


def test_an_illegal_layout_is_refused_with_the_rule() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.tensor"):
        parse_candidate("torch:tp2", SMALL)


@pytest.mark.parametrize(
    ("split", "num_layers", "expected"),
    [
        (None, 4, None),
        ((2, 0), 4, (4, 0)),
        ((0, 12), 4, (0, 4)),
        ((10, 22), 4, (1, 3)),
        ((0, 8, 8, 8), 4, (0, 2, 1, 1)),
        ((1, 5, 5, 1), 5, (1, 2, 1, 1)),
        ((31, 1), 4, (3, 1)),
    ],
)
def test_a_shrunk_split_keeps_its_empty_chunks_and_its_shares(
    split: tuple[int, ...] | None, num_layers: int, expected: tuple[int, ...] | None
) -> None:
    assert shrunk_split(split, num_layers) == expected


OWN: dict[str, Any] = {
    "model": {"num_layers": 12},
    "engine": {"name": "megatron", "zero_stage": 1},
    "parallel": {"pipeline": 2, "pipeline_split": (12, 0), "overlap_grad_reduce": True},
    "launch": {"num_workers": 8},
    "train": {"global_batch_size": 16, "micro_batch_size": 2},
}


def test_the_own_layout_keeps_every_key_and_its_name_reads_back() -> None:
    whole = run(**OWN)
    small = shrink(whole, "fp32")
    own = own_candidate(whole, small, max_ranks=4)
    assert own is not None and own.world_size == 4
    given = {**whole.parallel.model_dump(), "pipeline_split": (4, 0)}
    assert own.config.parallel.model_dump() == given
    assert own.config.engine == whole.engine
    assert own.name == "megatron:dp2+pp2+split4.0+overlap+zero1"
    read = parse_candidate(own.name, small)
    assert (read.config.parallel, read.config.engine) == (own.config.parallel, own.config.engine)


@pytest.mark.parametrize(("heads", "exchange"), [(3, "ring"), (8, None)])
def test_an_own_ring_stays_one_on_heads_that_could_be_dealt_out(heads: int, exchange: str | None) -> None:
    whole = run(
        model={"num_heads": heads, "num_kv_heads": 1, "hidden_size": 96}, engine={"name": "megatron"},
        parallel={"context": 2}, launch={"num_workers": 2},
    )  # fmt: skip
    own = own_candidate(whole, shrink(whole, "fp32"), max_ranks=2)
    assert own is not None and own.config.parallel.context_exchange == exchange
    assert own.name == f"megatron:cp2{'' if exchange is None else '+ring'}"


def test_an_own_layout_that_takes_too_many_ranks_is_none() -> None:
    whole = run(**OWN)
    assert own_candidate(whole, shrink(whole, "fp32"), max_ranks=1) is None
    deep = run(**{**OWN, "parallel": {"pipeline": 4, "virtual_pipeline": 2}, "model": {"num_layers": 16}})
    assert shrink(deep, "fp32", 2).model.num_layers == 4
    small = shrink(deep, "fp32", 4)
    assert small.model.num_layers == 8
    own = own_candidate(deep, small, max_ranks=4)
    assert own is not None and own.config.parallel == deep.parallel
