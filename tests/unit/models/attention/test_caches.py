"""Decoding in chunks and in rows that differ in length gives the numbers of the whole sequence, for every kind."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from llmtrain.models.attention.caches import BlockStore, ChunkCache, MemoryCache, RowCache, RowStates, StateStore
from llmtrain.models.attention.multi_head import Attention, AttentionInputs
from llmtrain.models.attention.rows import BLOCK, RowGroup, Rows, table_length
from llmtrain.models.attention.scoring import Visibility
from llmtrain.models.positions import RelativeBias, build_position_bias, rotary_angles
from tests.support.samples import tiny_model
from tests.unit.models.attention.attention_cases import SITE, built, weighed
from tests.unit.models.attention.dense_attention import KINDS

pytestmark = pytest.mark.usefixtures("small_blocks")

LENGTHS = (3 * BLOCK + 7, 5)
"""Of two sequences: one with four blocks, and one that begins."""
STEPS = BLOCK
"""Further positions of each, which come one at a time."""
BLOCKS = ([7, 2, 9, 4, 1], [3, 8])


def grouped(ends: list[int], tables: Sequence[list[int]] = BLOCKS) -> list[RowGroup]:
    """Each row alone, or all together with tables of one length."""
    longest = max(map(table_length, ends))
    blocks = torch.tensor([[*table, *[0] * longest][:longest] for table in tables])
    if ends[0] % 2:
        return [RowGroup(torch.arange(2), blocks, torch.tensor(ends), is_all=True)]
    return [RowGroup(torch.tensor([n]), blocks[n : n + 1], torch.tensor(ends[n : n + 1]), False) for n in (1, 0)]


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("position", ["rope", "alibi", "t5_relative"])
@pytest.mark.parametrize("extras", [{}, {"sinks": True, "softcap": 3.0}], ids=["plain", "extras"])
def test_chunks_and_rows_give_the_same_numbers_as_the_whole_sequence(
    kind: str, position: str, extras: dict[str, Any]
) -> None:
    if kind == "linear" and (position != "rope" or extras):
        return
    config = tiny_model(position=position, qk_norm=True, relative_buckets=8, attention={**KINDS[kind], **extras})
    attention, bias = weighed(Attention(config, SITE).double()), build_position_bias(config, causal=True)
    if isinstance(bias, RelativeBias):
        bias.weight.data.normal_()

    def inputs(places_BS: torch.Tensor) -> AttentionInputs:
        rotary = rotary_angles(config, places_BS, torch.float64) if position == "rope" else None
        return AttentionInputs(rotary, Visibility(), bias)

    def span(start: int, end: int) -> AttentionInputs:
        return inputs(torch.arange(start, end)[None])

    sequences = [torch.randn(length + STEPS, 1, 32).double() for length in LENGTHS]
    whole = [attention(x, span(0, len(x))) for x in sequences]
    store = StateStore(3) if kind == "linear" else BlockStore(10)
    found = [list[torch.Tensor]() for _ in LENGTHS]
    for number, (x, length) in enumerate(zip(sequences, LENGTHS, strict=True)):
        for start, end in ((0, length // 2), (length // 2, length)):
            if isinstance(store, StateStore):
                cache = RowStates(store, torch.tensor([number + 1]), begins=start == 0)
            else:
                cache = ChunkCache(store, torch.tensor(BLOCKS[number]), start)
            found[number].append(attention(x[start:end], span(start, end), cache))
    for step in range(STEPS):
        at = [length + step for length in LENGTHS]
        rows = Rows(
            torch.tensor([1, 2]),
            torch.tensor([BLOCKS[n][place // BLOCK] for n, place in enumerate(at)]),
            torch.tensor([place % BLOCK for place in at]),
        )
        if isinstance(store, StateStore):
            cache = RowStates(store, rows.slots_B)
        else:
            cache = RowCache(store, rows, grouped([place + 1 for place in at]))
        x = torch.cat([x[place : place + 1] for x, place in zip(sequences, at, strict=True)], 1)
        out = attention(x, inputs(torch.tensor(at)[:, None]), cache)
        for number in range(2):
            found[number].append(out[:, number : number + 1])
    for parts, expected in zip(found, whole, strict=True):
        torch.testing.assert_close(torch.cat(parts), expected)


def test_a_memory_is_projected_once_and_rows_see_their_own() -> None:
    attention, calls = built(cross=True), []
    attention.k.register_forward_hook(lambda *_: calls.append("k"))
    attention.v.register_forward_hook(lambda *_: calls.append("v"))
    x = torch.randn(6, 2, 32).double()
    memories = [torch.randn(length, 1, 32).double() for length in (9, BLOCK + 3)]
    inputs = AttentionInputs(visible=Visibility(causal=False))
    whole = [attention(x[:, n : n + 1], inputs, memory_TBH=memory) for n, memory in enumerate(memories)]
    calls.clear()
    store, tables = BlockStore(5), [[4], [1, 3]]
    for n, memory in enumerate(memories):
        for begins in (True, False):
            cache = MemoryCache(store, torch.tensor(tables[n]), len(memory), begins)
            part = slice(0, 4) if begins else slice(4, 5)
            out = attention(x[part, n : n + 1], inputs, cache, memory if begins else None)
            torch.testing.assert_close(out, whole[n][part])
    rows = Rows(*torch.zeros(3, 2, dtype=torch.long).unbind())
    together = attention(x[5:], inputs, RowCache(store, rows, grouped([9, BLOCK + 3], tables)))
    torch.testing.assert_close(together, torch.cat([each[5:] for each in whole], 1))
    assert calls == ["k", "v"] * 2


def test_tables_are_as_long_as_needed_and_half_more_at_most() -> None:
    lengths = [table_length(blocks * BLOCK) for blocks in range(1, 66)]
    assert lengths[:9] == [1, 2, 3, 4, 6, 6, 8, 8, 12]
    assert all(needed <= length <= 1.5 * needed for needed, length in enumerate(lengths, 1))
    assert table_length(0) == 1 and table_length(BLOCK + 1) == 2
