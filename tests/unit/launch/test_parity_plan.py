import pytest

from launch.parity_plan import iter_candidates, parse_candidate, shrink
from llmtrain.config.rules import arithmetic_problems
from llmtrain.errors import ConfigError
from tests.support.samples import tiny_model, tiny_run

SMALL = shrink(tiny_run(tiny_model(num_layers=32, num_heads=32, num_kv_heads=8, hidden_size=4096)), "fp32")


def test_a_shrunk_model_keeps_kinds_and_head_ratio() -> None:
    assert (SMALL.model.num_heads, SMALL.model.num_kv_heads) == (4, 1)
    assert SMALL.model.norm == "rmsnorm"
    assert arithmetic_problems(SMALL, 1) == []


@pytest.mark.parametrize(("given", "compared"), [("relu", "gelu"), ("reglu", "geglu"), ("swiglu", "swiglu")])
def test_a_shrunk_model_has_no_activation_with_a_kink(given: str, compared: str) -> None:
    assert shrink(tiny_run(tiny_model(activation=given)), "fp32").model.activation == compared


@pytest.mark.parametrize(("kind", "block_size"), [("full", 64), ("bigbird", 4)])
def test_only_a_pattern_that_is_in_use_is_shrunk(kind: str, block_size: int) -> None:
    small = shrink(tiny_run(tiny_model(attention={"kind": kind})), "fp32")
    assert small.model.attention.block_size == block_size
    assert arithmetic_problems(small, 1) == []


def test_every_candidate_is_legal_and_its_name_reads_back() -> None:
    small = shrink(tiny_run(), "fp32")
    candidates = list(iter_candidates(small, 2))
    names = [candidate.name for candidate in candidates]
    assert len(set(names)) == len(names)
    wanted = {"torch:dp1", "torch:dp2", "megatron:tp2", "megatron:tp2+sp+zero1", "megatron:pp2+vp2", "megatron:cp2"}
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
