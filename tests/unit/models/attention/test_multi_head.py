"""Every kind with everything that it combines with, against the dense reference, forward and backward."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llmtrain.config.attention import AttentionConfig
from llmtrain.models.attention.multi_head import Attention, AttentionInputs, fused_attention, kernel_for
from llmtrain.models.attention.patterns import Full
from llmtrain.models.attention.scoring import Scoring, Visibility
from llmtrain.models.positions import RelativeBias, build_position_bias, rotary_angles
from llmtrain.parallel.stateless_random import Draws
from tests.support.samples import tiny_model
from tests.unit.models.attention.attention_cases import (
    BATCH,
    SITE,
    Case,
    built,
    compared,
    random_qkv,
    visibility,
    weighed,
)
from tests.unit.models.attention.dense_attention import (
    KINDS,
    LENGTH,
    SOFTMAX_KINDS,
    dense_mask,
    gradients,
    softmax_attention,
)

pytestmark = pytest.mark.usefixtures("small_blocks")

FACTORS: dict[str, tuple[Any, ...]] = {
    "kind": tuple(SOFTMAX_KINDS),
    "causal": (True, False),
    "restriction": ("none", "documents", "padding", "prefix"),
    "kv_heads": (4, 2, 1),
    "position": ("none", "alibi", "t5_relative"),
    "softcap": (None, 2.0),
    "sinks": (False, True),
    "dropout": (0.0, 0.3),
    "scale": (None, 1.0),
}


def pairwise() -> Iterator[Case]:
    """Cases in which every two values of different factors meet; each new case meets as many new pairs as it can."""
    names = list(FACTORS)
    missing = {
        ((a, x), (b, y))
        for i, a in enumerate(names)
        for b in names[i + 1 :]
        for x in FACTORS[a]
        for y in FACTORS[b]
        if {(a, x), (b, y)} != {("causal", False), ("restriction", "prefix")}
    }
    while missing:
        chosen = dict(min(missing, key=repr))
        for name in names:
            if name not in chosen:
                chosen[name] = max(FACTORS[name], key=lambda value: gain(missing, chosen, name, value))
        found = {pair for pair in missing if all(chosen[name] == value for name, value in pair)}
        missing -= found
        yield Case(**chosen)


def gain(missing: set[Any], chosen: dict[str, Any], name: str, value: Any) -> int:
    if {(name, value), *chosen.items()} >= {("causal", False), ("restriction", "prefix")}:
        return -1
    return sum(
        (name, value) in pair
        and all(chosen.get(other, seen) == seen for other, seen in pair if other != name)
        and any(other in chosen for other, _ in pair)
        for pair in missing
    )


PAIRWISE = list(pairwise())


@pytest.mark.parametrize("case", PAIRWISE, ids=str)
def test_every_kind_equals_the_dense_reference_forward_and_backward(case: Case) -> None:
    ours, theirs = compared(case)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-6)


def test_the_selection_has_every_pair() -> None:
    assert 20 <= len(PAIRWISE) <= 40
    for kind in SOFTMAX_KINDS:
        assert {case.causal for case in PAIRWISE if case.kind == kind} == {True, False}
        assert {case.restriction for case in PAIRWISE if case.kind == kind} == set(FACTORS["restriction"])


@pytest.mark.parametrize("kind", SOFTMAX_KINDS)
def test_every_kind_under_every_visibility(kind: str) -> None:
    for causal in (True, False):
        for restriction in ("none", "documents", "padding", *(["prefix"] if causal else [])):
            ours, theirs = compared(Case(kind, causal, restriction))
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["full", "sliding_window"])
def test_half_precision_is_near_the_reference(kind: str) -> None:
    """Scores and sums are fp32: the error is that of inputs and outputs."""
    attention = built(torch.bfloat16, attention=KINDS[kind], position="alibi")
    qkv = random_qkv(2, dtype=torch.bfloat16)
    bias, places = build_position_bias(tiny_model(position="alibi"), causal=True), torch.arange(LENGTH)
    assert bias is not None
    ours = attention.attend(*qkv, AttentionInputs(bias=bias))
    assert ours.dtype == torch.bfloat16
    mask = dense_mask(AttentionConfig(**KINDS[kind]), Visibility(), BATCH, LENGTH, LENGTH)
    q, k, v = (x.double() for x in qkv)
    theirs = softmax_attention((q, k, v), mask, scale=8**-0.5, bias_NST=bias.scores(places, places, 0, 4))
    torch.testing.assert_close(ours.double(), theirs, rtol=0.02, atol=0.02)
    for mine, reference in zip(gradients(ours, qkv), gradients(theirs, qkv), strict=True):
        torch.testing.assert_close(mine.double(), reference.double(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("causal", [True, False])
def test_queries_that_see_nothing_give_zeros_and_no_gradient(kind: str, causal: bool) -> None:
    """All keys of one sample are padding: its output is zero, its gradients are, and no number is missing anywhere."""
    visible = Visibility(causal, None, torch.tensor([[0] * LENGTH, [-1] * LENGTH]))
    qkv = random_qkv(2)
    out = built(attention=KINDS[kind]).attend(*qkv, AttentionInputs(visible=visible))
    assert not out[:, 1].any()
    assert out[:, 0].all()
    for gradient in gradients(out, qkv):
        assert gradient.isfinite().all()
        assert not gradient[:, 1].any()


@pytest.mark.parametrize("padded", [True, False])
def test_cross_attention_sees_the_whole_memory(padded: bool) -> None:
    """Full whatever the kind, without positions, bias or sinks; softcap and scale stay."""
    attention = built(
        cross=True, qk_norm=True, attention={**KINDS["sliding_window"], "sinks": True, "softcap": 2.0, "scale": 0.7}
    )
    assert attention.sinks is None
    x, memory = torch.randn(5, BATCH, 32).double(), torch.randn(9, BATCH, 32).double()
    keys_BT = torch.tensor([[0] * 7 + [-1] * 2, [0] * 9]) if padded else None
    visible = Visibility(causal=False, keys_BT=keys_BT)
    rotary = rotary_angles(tiny_model(), torch.arange(5)[None], torch.float64)
    bias = build_position_bias(tiny_model(position="alibi"), causal=True)
    ours = attention(x, AttentionInputs(rotary, visible, bias), memory_TBH=memory)
    q, k, v = (
        linear(y).unflatten(-1, (-1, 8))
        for linear, y in ((attention.q, x), (attention.k, memory), (attention.v, memory))
    )
    assert attention.q_norm is not None and attention.k_norm is not None
    mask = torch.ones(BATCH, 5, 9, dtype=torch.bool) if keys_BT is None else (keys_BT >= 0)[:, None].expand(-1, 5, -1)
    theirs = softmax_attention((attention.q_norm(q), attention.k_norm(k), v), mask, scale=0.7, softcap=2.0)
    torch.testing.assert_close(ours, attention.out(theirs.flatten(-2)))


def test_normalized_queries_and_keys() -> None:
    """Scaling a head's queries or keys changes nothing, and the norms' weights do."""
    attention = built(qk_norm=True)
    x = torch.randn(6, BATCH, 32).double()
    before = attention(x, AttentionInputs())
    attention.q.weight.data *= 3
    torch.testing.assert_close(attention(x, AttentionInputs()), before, rtol=1e-3, atol=1e-4)
    assert attention.k_norm is not None
    attention.k_norm.weight.data *= 3
    assert not torch.allclose(attention(x, AttentionInputs()), before, rtol=1e-2)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bias": True, "qk_norm": True},
        {"attention": KINDS["linear"]},
        {"attention": {**KINDS["sliding_window"], "sinks": True, "softcap": 1.0}},
    ],
)
def test_gradient_is_right(changes: dict[str, Any]) -> None:
    attention = built(hidden_size=8, num_heads=2, num_kv_heads=1, **changes)
    angles = rotary_angles(tiny_model(hidden_size=8, num_heads=2), torch.arange(3)[None], torch.float64)
    x = torch.randn(3, 1, 8, dtype=torch.float64, requires_grad=True)
    inputs = AttentionInputs(angles)
    assert torch.autograd.gradcheck(lambda x, *_: attention(x, inputs), (x, *attention.parameters()), fast_mode=True)


@pytest.mark.parametrize("kind", list(KINDS))
def test_later_positions_change_nothing(kind: str) -> None:
    attention = built(attention=KINDS[kind])
    x = torch.randn(LENGTH, 1, 32, dtype=torch.float64)
    changed = x.clone()
    changed[30:] += 1
    before, after = attention(x, AttentionInputs()), attention(changed, AttentionInputs())
    torch.testing.assert_close(before[:30], after[:30], rtol=0, atol=0)
    assert not torch.allclose(before[30:], after[30:])


@pytest.mark.parametrize("position", ["alibi", "t5_relative"])
def test_a_rank_with_some_of_the_heads_computes_the_same(position: str) -> None:
    """Tensor rank 1 of 2 holds heads 2 and 3 with their sinks and columns; context rank 1 of 2 computes head 3."""
    config = Case("longformer", position=position, sinks=True, dropout=0.3).config
    whole, bias = weighed(Attention(config, SITE).double()), build_position_bias(config, causal=True)
    if isinstance(bias, RelativeBias):
        bias.weight.data.normal_(generator=torch.Generator().manual_seed(5))
    draws = Draws.of_micro_batch(0, 1, 0, torch.device("cpu"))
    q, k, v = random_qkv(4)
    expected = whole.attend(q, k, v, AttentionInputs(bias=bias, draws=draws))
    part, part_bias = weighed(Attention(config, SITE).double()), bias
    assert whole.sinks is not None
    part.sinks = torch.nn.Parameter(whole.sinks[2:].detach())
    part.tensor_first_head, part.first_head = 2, 3
    if isinstance(bias, RelativeBias):
        part_bias = RelativeBias(config, bidirectional=False)
        part_bias.weight, part_bias.first_head = torch.nn.Parameter(bias.weight[:, 2:].detach()), 2
    q, k, v = (x[:, :, 3:] for x in (q, k, v))
    torch.testing.assert_close(part.attend(q, k, v, AttentionInputs(bias=part_bias, draws=draws)), expected[:, :, 3:])


@pytest.mark.parametrize("kind", list(KINDS))
def test_recomputing_the_kernel_gives_the_same_bits(kind: str) -> None:
    config, x = Case(kind).config, torch.randn(LENGTH, BATCH, 32)
    results = []
    for recompute in (False, True):
        attention = weighed(Attention(config, SITE, recompute_kernel=recompute)).train()
        out = attention(x, AttentionInputs())
        results.append([out, *gradients(out, list(attention.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_fastest_kernel_that_computes_it_is_chosen() -> None:
    def chosen(case: Case, restriction: str = "none", device: str = "cpu") -> str:
        attention = Attention(case.config, SITE)
        q = torch.empty(128, 1, 4, 32, device="meta", dtype=torch.bfloat16)
        bias = build_position_bias(case.config, causal=True)
        draws = Draws(torch.zeros((), dtype=torch.int64))
        inputs = AttentionInputs(
            None, visibility(True, restriction), bias.to("cpu") if isinstance(bias, RelativeBias) else bias, draws
        )
        scoring = attention.scoring(torch.empty(128, 1, 4, 32), q, inputs)
        return kernel_for(q, q, scoring, on_gpu=device == "cuda")

    for device in ("cpu", "cuda"):
        assert chosen(Case("full"), device=device) == "fused"
        assert chosen(Case("full", dropout=0.1), device=device) == "blockwise"
        assert chosen(Case("strided"), device=device) == "blockwise"
        assert chosen(Case("sliding_window", position="t5_relative"), device=device) == "blockwise"
    for restriction in ("documents", "padding", "prefix"):  # a mask [S, T] would cost the fused kernels' speed
        assert chosen(Case("full"), restriction) == "fused"
        assert chosen(Case("full"), restriction, "cuda") == "flex"
    for case in (Case("sliding_window"), Case("bigbird"), Case("longformer"), Case("full", softcap=1.0, sinks=True)):
        assert (chosen(case), chosen(case, device="cuda")) == ("blockwise", "flex")
        assert chosen(Case(case.kind, position="alibi", dropout=0.1), device="cuda") == "blockwise"
    assert chosen(Case("full", position="alibi"), device="cuda") == "flex"


def test_on_a_gpu_keys_and_values_of_groups_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append((k.shape[1], v.shape[1], options.get("enable_gqa", False)))
        return q

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    with FakeTensorMode():
        for device in ("cpu", "cuda"):
            q, k = (torch.empty(LENGTH, BATCH, heads, 16, device=device) for heads in (8, 2))
            fused_attention(q, k, k, Scoring(Full(), Visibility(), 0.25))
    assert seen == [(8, 8, False), (2, 2, True)]
