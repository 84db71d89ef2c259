"""FlexAttention's masks and scores against the dense reference; on the CPU it has a forward pass only."""

import pytest
import torch

from llmtrain.models.attention.flex_kernel import block_mask, can_flex, flex_kernel
from llmtrain.models.attention.multi_head import Attention, AttentionInputs
from llmtrain.models.attention.scoring import Visibility
from llmtrain.models.positions import build_position_bias
from tests.unit.models.attention.attention_cases import BATCH, SITE, Case, random_qkv, visibility, weighed
from tests.unit.models.attention.dense_attention import KINDS, dense_mask, gradients, softmax_attention

CASES = [
    Case("sliding_window", restriction="documents", kv_heads=2),
    Case("longformer", causal=False, restriction="padding", softcap=2.0),
    Case("bigbird", sinks=True, position="alibi", kv_heads=1),
    Case("bigbird", causal=False, sinks=True, restriction="padding"),
    Case("full", restriction="prefix", softcap=2.0, position="alibi", sinks=True, scale=1.0),
    Case("full", causal=False, restriction="documents", position="alibi"),
]
SEQ_LEN, LONGER = 40, 280
"""The second is more than two of its own blocks, and not whole ones."""


@pytest.fixture
def small_flex_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmtrain.models.attention.flex_kernel.BLOCK", 8)


def longer(visible: Visibility) -> Visibility:
    """Every position seven times."""
    keys = None if visible.keys_BT is None else visible.keys_BT.repeat_interleave(LONGER // SEQ_LEN, dim=1)
    prefix = None if visible.prefix_B is None else visible.prefix_B * (LONGER // SEQ_LEN)
    return Visibility(visible.causal, None if visible.queries_BS is None else keys, keys, prefix)


def ours_and_theirs(case: Case, dtype: torch.dtype, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    attention = weighed(Attention(case.config, SITE)).to(device)
    bias = build_position_bias(case.config, case.causal)
    visible = longer(visibility(case.causal, case.restriction, device))
    # A head of 16, the least that it takes.
    made = random_qkv(case.kv_heads, LONGER, LONGER)
    q, k, v = (torch.cat((x, x.flip(0)), dim=-1).detach().to(device) for x in made)
    wanted = [x.to(dtype).requires_grad_(device == "cuda") for x in (q, k, v)]
    scoring = attention.scoring(wanted[0], wanted[1], AttentionInputs(None, visible, bias))
    assert can_flex(wanted[0], wanted[1], scoring)
    ours = flex_kernel(*wanted, scoring)
    places = torch.arange(LONGER, device=device)
    theirs = softmax_attention(
        (wanted[0].double(), wanted[1].double(), wanted[2].double()),
        dense_mask(case.config.attention, visible, BATCH, LONGER, LONGER).to(device),
        scale=case.scale or 8**-0.5,
        softcap=case.softcap,
        bias_NST=None if bias is None else bias.scores(places, places, 0, 4),
        sinks_N=None if attention.sinks is None else attention.sinks.detach().double(),
    )
    if device == "cpu":
        return ours, theirs
    return ours, *gradients(ours, wanted), theirs, *gradients(theirs, wanted)


@pytest.mark.parametrize("kind", ["full", "sliding_window", "bigbird", "longformer"])
@pytest.mark.usefixtures("small_flex_blocks")
def test_masks_are_the_definition_and_blocks_leave_out_nothing_of_it(kind: str) -> None:
    for causal in (True, False):
        for restriction in ("none", "documents", "padding", *(["prefix"] if causal else [])):
            case = Case(kind, causal, restriction)
            visible, pattern = visibility(causal, restriction), Attention(case.config, SITE).pattern
            made = block_mask(pattern, visible, SEQ_LEN, torch.device("cpu"))
            assert block_mask(pattern, visible, SEQ_LEN, torch.device("cpu")) is made
            meant = dense_mask(case.config.attention, visible, BATCH, SEQ_LEN, SEQ_LEN)
            places = torch.arange(SEQ_LEN)
            rule = made.mask_mod(torch.arange(BATCH)[:, None, None], torch.tensor(0), places[:, None], places)
            assert torch.equal(rule.expand_as(meant), meant)
            blocks = made.to_dense()[:, 0].bool()
            needed = meant.unflatten(1, (-1, 8)).unflatten(3, (-1, 8)).any(2).any(-1)
            assert not (needed & ~blocks).any()
            if restriction == "none":
                assert torch.equal(blocks.expand_as(needed), needed)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_uncompiled_it_equals_the_dense_reference(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr("llmtrain.models.attention.flex_kernel.compiled_flex_attention", lambda: flex_attention)
    ours, theirs = ours_and_theirs(case, torch.float32)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.whole_grid
@pytest.mark.parametrize("case", [case for case in CASES if not case.sinks], ids=str)  # sinks need what it lacks there
def test_compiled_on_the_cpu_it_equals_the_dense_reference(case: Case) -> None:
    ours, theirs = ours_and_theirs(case, torch.float32)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention has a backward pass on GPUs only")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_a_gpu_it_equals_the_dense_reference_forward_and_backward(case: Case) -> None:
    results = ours_and_theirs(case, torch.float32, "cuda")
    half = len(results) // 2
    for mine, reference in zip(results[:half], results[half:], strict=True):
        torch.testing.assert_close(mine.double(), reference.double(), rtol=2e-2, atol=2e-2)


def test_what_it_does_not_compute() -> None:
    def fits(
        case: Case, dtype: torch.dtype = torch.bfloat16, size: int = 16, lengths: tuple[int, int] = (LONGER, LONGER)
    ) -> bool:
        attention, bias = Attention(case.config, SITE), build_position_bias(case.config, causal=True)
        q, k = (torch.empty(length, 1, 4, size, dtype=dtype) for length in lengths)
        return can_flex(q, k, attention.scoring(q, k, AttentionInputs(bias=bias)))

    case = Case("sliding_window", position="alibi")
    assert fits(case)
    assert not fits(case, dtype=torch.float64)
    assert not fits(case, size=8)
    assert not fits(case, lengths=(1, LONGER))
    assert not fits(case, lengths=(127, 127))
    assert not fits(Case("sliding_window", position="t5_relative"))
    assert set(KINDS) >= {case.kind}
