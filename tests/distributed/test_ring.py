"""Attention in a ring beside dense attention on one process: every kind with everything that it combines with, what is
sent and kept, and code that is broken in one place."""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmtrain.models.attention import patterns
from llmtrain.models.attention.multi_head import Attention, AttentionInputs
from llmtrain.models.attention.scoring import Visibility
from llmtrain.parallel.parts import HeldPositions, cut_sequence
from llmtrain.parallel.ring import Ring
from tests.support.collectives import Collectives
from tests.support.live_bytes import LiveBytes
from tests.support.ranks import run_ranks
from tests.support.samples import tiny_model
from tests.unit.models.attention.attention_cases import BATCH, Case, build, built, compared, documents, random_qkv
from tests.unit.models.attention.dense_attention import LENGTH, gradients, softmax_attention
from tests.unit.models.attention.test_multi_head import PAIRWISE

Mutation = Callable[[], None]
Results = list[Tensor]

HEADS, SIZE = 4, 8
CASES = [*(Case("full", causal, kv_heads=2) for causal in (True, False)), Case("sliding_window"), *PAIRWISE]
SOME = CASES[:12]

dense = cache(lambda case: compared(case)[1])
"""By case, its results on one process from the definitions."""


def whole_ring(balanced: bool) -> Ring:
    return Ring(dist.group.WORLD, balanced)  # type: ignore[arg-type]


def attended_rank(
    rank: int, world_size: int, cases: Sequence[Case], balanced: bool, mutation: Mutation | None = None
) -> list[Results]:
    """Of every case this rank's part of the output, of the gradients of q, k and v, and of those of weights."""
    patterns.QUERY_BLOCK = 8
    if mutation:
        mutation()
    own = cut_sequence(LENGTH, rank, world_size, balanced)
    found = []
    for case in cases:
        whole = build(case)
        whole.attention.ring = whole_ring(balanced)
        found.append(part_of(whole.attention, whole.inputs, whole.qkv, (own, own), whole.weights))
    return found


def part_of(
    attention: Attention,
    inputs: AttentionInputs,
    qkv: Sequence[Tensor],
    held: tuple[HeldPositions, HeldPositions],
    weights: Sequence[Tensor] = (),
) -> Results:
    queries, keys = held
    parts = [own.of(x.detach()).requires_grad_() for own, x in zip((queries, keys, keys), qkv, strict=True)]
    out = attention.attend(*parts, inputs)
    # The weights of the sum that `gradients` takes.
    generator = torch.Generator().manual_seed(7)
    factors = torch.randn(qkv[0].shape, generator=generator, dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, [*parts, *weights], queries.of(factors))]


def assembled(ranks: list[Results], balanced: bool) -> Results:
    """Parts by their places, gradients of weights as sums."""
    (*of_sequences,) = (
        placed([results[number] for results in ranks], balanced) for number in range(min(4, len(ranks[0])))
    )
    return [*of_sequences, *(sum(parts) for parts in zip(*(results[4:] for results in ranks), strict=True))]  # type: ignore[list-item]


def placed(parts: Sequence[Tensor], balanced: bool) -> Tensor:
    count, length = len(parts), len(parts) * parts[0].shape[0]
    whole = parts[0].new_empty(length, *parts[0].shape[1:])
    for rank, part in enumerate(parts):
        own = cut_sequence(length, rank, count, balanced)
        whole[own.places(own.size, whole.device)] = part
    return whole


def differing(cases: Sequence[Case], ranks: int, balanced: bool, mutation: Mutation | None = None) -> list[str]:
    """Results that are not those of dense attention."""
    together = run_ranks(attended_rank, ranks, cases, balanced, mutation, timeout_seconds=120)
    wrong = []
    for number, case in enumerate(cases):
        ours = assembled([found[number] for found in together], balanced)
        names = ("out", "grad q", "grad k", "grad v", "weight", "other weight")
        for name, mine, reference in zip(names, ours, dense(case), strict=False):
            if not torch.allclose(mine, reference, rtol=1e-5, atol=1e-6):
                wrong.append(f"{name} of {case}")
    return wrong


@pytest.mark.parametrize(
    ("cases", "ranks", "balanced"),
    [
        pytest.param(SOME, 2, True, id="2-balanced"),
        pytest.param(CASES, 4, True, id="4-balanced"),
        *(pytest.param(CASES, *case, marks=pytest.mark.whole_grid) for case in product((2, 4), (True, False))),
    ],
)
def test_every_kind_equals_the_dense_reference_forward_and_backward(
    cases: Sequence[Case], ranks: int, balanced: bool
) -> None:
    assert differing(cases, ranks, balanced) == []


def crossing_rank(rank: int, world_size: int, num_queries: int) -> Results:
    """Attention to a memory with padding, which is longer or shorter than the queries."""
    attention = built(cross=True, num_kv_heads=2)
    attention.ring = whole_ring(balanced=True)
    held = (cut_sequence(length, rank, world_size, balanced=True) for length in (num_queries, LENGTH))
    inputs = AttentionInputs(visible=Visibility(False, keys_BT=documents()))
    return part_of(attention, inputs, random_qkv(2, num_queries), tuple(held))  # type: ignore[arg-type]


@pytest.mark.parametrize("num_queries", [8, 64])
def test_cross_attention_equals_the_dense_reference(num_queries: int) -> None:
    ours = assembled(run_ranks(crossing_rank, 2, num_queries), balanced=True)
    q, k, v = random_qkv(2, num_queries)
    seen_BST = (documents() >= 0)[:, None].expand(-1, num_queries, -1)
    theirs = softmax_attention((q, k, v), seen_BST, scale=SIZE**-0.5)
    for mine, reference in zip(ours, [theirs, *gradients(theirs, [q, k, v])], strict=True):
        torch.testing.assert_close(mine, reference)


class Largest(TorchDispatchMode):
    """While it is entered, the most elements that a tensor has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


def measured_rank(
    rank: int, world_size: int, length: int, precision: str, kind: dict[str, Any]
) -> tuple[dict[tuple[str, int], int], int, int]:
    """(messages, bytes kept for the backward pass, elements of the largest tensor) of one call."""
    attention = Attention(tiny_model(num_heads=HEADS, num_kv_heads=2, position="none", attention=kind), "site")
    attention.ring = whole_ring(balanced="window" not in kind)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    q, k, v = (
        torch.randn(length // world_size, BATCH, heads, SIZE, dtype=dtype, requires_grad=True)
        for heads in (HEADS, 2, 2)
    )
    # The order counts: what is sent lies under autograd, and the largest tensor above all.
    with Collectives() as sent, Largest() as largest:
        with LiveBytes() as live:
            out = attention.attend(q, k, v, AttentionInputs())
        kept = live.num_bytes
        out.backward(torch.ones_like(out))
    return dict(sent.calls), kept, largest.elements


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_messages_and_memory_are_those_of_blocks(precision: str) -> None:
    """(c - 1) blocks forward, as many again backward, and as many gradients in fp32; kept are a rank's own parts."""
    ranks, length = 4, 512
    num_bytes = {"fp32": 4, "bf16": 2}[precision]
    block = 2 * length // ranks * BATCH * 2 * SIZE
    queries = length // ranks * BATCH * HEADS * SIZE
    for sent, kept, largest in run_ranks(measured_rank, ranks, length, precision, {}):
        expected = {("send", block * num_bytes): 2 * (ranks - 1)}
        expected["send", block * 4] = expected.get(("send", block * 4), 0) + ranks - 1
        assert sent == expected
        log_sums = length // ranks * BATCH * HEADS * 4
        assert kept == (block + queries) * num_bytes + log_sums
        # No keys of the whole sequence, and no square of a part.
        assert largest < length * BATCH * 2 * SIZE * 2
        assert largest < BATCH * HEADS * (length // ranks) ** 2


def test_a_window_sends_blocks_no_further_than_it_reaches() -> None:
    window = {"kind": "sliding_window", "window": 20}
    for sent, *_ in run_ranks(measured_rank, 4, 4 * 128, "fp32", window):
        assert sum(sent.values()) == 3  # a block forward and again backward, and the gradients straight home


def leave_a_block_out() -> None:
    """The last block that would come is not waited for."""
    from llmtrain.models.attention.ring import Turn

    right = Turn.moves
    Turn.moves = lambda self, extent: right(self, extent) - 1


def join_without_log_sums() -> None:
    """All blocks count alike."""
    from llmtrain.models.attention import ring

    right = ring.BlockwiseBlocks.forward

    def forward(self: Any, *arguments: Any) -> Any:
        for rows, out, log_sum in right(self, *arguments):
            yield rows, out, log_sum.clamp(min=0, max=0)

    ring.BlockwiseBlocks.forward = forward


def keep_the_gradients_of_others() -> None:
    """What a rank has for the keys of others is not sent home, but taken for its own."""
    from llmtrain.parallel.ring import Ring, Transfer

    right = Ring.shift
    Ring.shift = lambda self, block, by, kind: (
        right(self, block, by, kind) if kind == "blocks" else Transfer([], block, block)
    )


def place_queries_as_if_in_one_run() -> None:
    from llmtrain.models.attention import ring

    right = ring.cut_sequence
    ring.cut_sequence = lambda length, place, count, balanced: right(length, place, count, False)


@pytest.mark.parametrize(
    ("mutation", "case", "named"),
    [
        (leave_a_block_out, Case("full"), {"out", "grad q", "grad k", "grad v"}),
        (join_without_log_sums, Case("full", softcap=2.0), {"out", "grad q"}),
        (keep_the_gradients_of_others, Case("full"), {"grad k", "grad v"}),
        (place_queries_as_if_in_one_run, Case("strided", sinks=True), {"out", "weight"}),
    ],
)
def test_broken_code_is_caught(mutation: Mutation, case: Case, named: set[str]) -> None:
    wrong = {text.partition(" of ")[0] for text in differing([case], 4, balanced=True, mutation=mutation)}
    assert named <= wrong
