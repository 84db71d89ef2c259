"""Decoding with a cache gives the numbers of the whole sequence, for every kind."""

from typing import Any

import pytest
import torch

from llmtrain.models.attention.caches import KeyValueCache, MemoryCache, StateCache, build_cache
from llmtrain.models.attention.multi_head import Attention, AttentionInputs
from llmtrain.models.attention.scoring import Visibility
from llmtrain.models.positions import RelativeBias, build_position_bias, rotary_angles
from tests.support.samples import tiny_model
from tests.unit.models.attention.attention_cases import BATCH, SITE, built, documents, weighed
from tests.unit.models.attention.dense_attention import KINDS, LENGTH

pytestmark = pytest.mark.usefixtures("small_blocks")

PARTS = ((0, 17), (17, 18), (18, 19), (19, 33), (33, 34), (34, 40))


def visible_part(kind: str, start: int, end: int) -> Visibility:
    """Of queries start..end - 1, in the middle of their documents; none: no restriction."""
    match kind:
        case "documents":
            return Visibility(True, documents()[:, start:end], documents()[:, :end])
        case "padding":
            return Visibility(True, None, torch.where(documents() < 0, -1, 0)[:, :end])
        case _:
            return Visibility()


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("position", ["rope", "alibi", "t5_relative"])
def test_a_cache_gives_the_same_numbers_as_the_whole_sequence(kind: str, position: str) -> None:
    if kind == "linear" and position != "rope":
        return
    extras: dict[str, Any] = {} if kind in ("linear", "full") else {"sinks": True, "softcap": 3.0}
    config = tiny_model(position=position, qk_norm=True, relative_buckets=8, attention={**KINDS[kind], **extras})
    attention, bias = weighed(Attention(config, SITE).double()), build_position_bias(config, causal=True)
    if isinstance(bias, RelativeBias):
        bias.weight.data.normal_()
    x = torch.randn(LENGTH, BATCH, 32).double()
    for restriction in ("none", "documents", "padding"):

        def inputs(start: int, end: int, restriction: str = restriction) -> AttentionInputs:
            places = torch.arange(start, end).expand(BATCH, -1)
            rotary = rotary_angles(config, places, torch.float64) if position == "rope" else None
            return AttentionInputs(rotary, visible_part(restriction, start, end), bias)

        whole = attention(x, inputs(0, LENGTH))
        cache = build_cache(config, LENGTH)
        parts = [attention(x[a:b], inputs(a, b), cache) for a, b in PARTS]
        torch.testing.assert_close(torch.cat(parts), whole)


def test_linear_attention_keeps_a_state_and_the_others_keys() -> None:
    assert isinstance(build_cache(tiny_model(attention={"kind": "linear"}), 8), StateCache)
    assert isinstance(build_cache(tiny_model(attention=KINDS["sliding_window"]), 8), KeyValueCache)


def test_a_memory_is_projected_once() -> None:
    attention, calls = built(cross=True), []
    attention.k.register_forward_hook(lambda *_: calls.append("k"))
    attention.v.register_forward_hook(lambda *_: calls.append("v"))
    x, memory = torch.randn(6, BATCH, 32).double(), torch.randn(9, BATCH, 32).double()
    inputs = AttentionInputs(visible=Visibility(causal=False))
    whole = attention(x, inputs, memory_TBH=memory)
    calls.clear()
    cache = MemoryCache()
    parts = [attention(x[:4], inputs, cache, memory), attention(x[4:5], inputs, cache), attention(x[5:], inputs, cache)]
    torch.testing.assert_close(torch.cat(parts), whole)
    assert calls == ["k", "v"]
