"""What sliding-window attention takes at its peak, forward and backward, beside full scores: measured."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain.models.attention import patterns
from llmtrain.models.attention.multi_head import Attention, AttentionInputs
from llmtrain.parallel.stateless_random import Draws
from tests.support.memory import peak_growth
from tests.support.ranks import run_ranks
from tests.support.samples import tiny_model

SHORT, LONG = 8192, 32768  # shorter ones take less than what C's library happens to hold already, some MB
IN_ONE_PIECE = 2048
HEADS = 2


def peak_of(seq_len: int, block: int = patterns.QUERY_BLOCK) -> int:
    """In a process of its own: one that has freed memory hides what it takes."""
    (growth,) = run_ranks(measured, 1, seq_len, block)
    return growth


def measured(rank: int, world_size: int, seq_len: int, block: int) -> int:
    patterns.QUERY_BLOCK = block
    sizes: dict[str, Any] = {"hidden_size": 32, "num_heads": HEADS, "num_kv_heads": HEADS, "position": "alibi"}
    config = tiny_model(attention_dropout=0.1, attention={"kind": "sliding_window", "window": 64}, **sizes)
    attention = Attention(config, "decoder.0.attention")
    draws = Draws.of_micro_batch(0, 1, 0, torch.device("cpu"))

    def work(length: int) -> None:
        q, k, v = (torch.randn(length, 1, HEADS, 16, requires_grad=True) for _ in range(3))
        attention.attend(q, k, v, AttentionInputs(draws=draws)).sum().backward()

    work(256)  # what the first call loads stays
    return peak_growth(lambda: work(seq_len))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux for the peak of memory")
def test_memory_grows_with_the_length_and_not_with_its_square() -> None:
    """Four times the length takes about four times the memory; in one piece, a sixteenth of it takes more than that."""
    short, long = peak_of(SHORT), peak_of(LONG)
    assert long < 6 * short
    assert peak_of(IN_ONE_PIECE, block=IN_ONE_PIECE) > 2 * long
