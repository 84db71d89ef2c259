"""What blocks keep of a sequence that tensor ranks split: the whole of it, or their part and a second gather."""

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.parity.cases import parity_run, verdict
from tests.support.live_bytes import LiveBytes
from tests.support.ranks import run_ranks

LENGTH, BATCH, WIDTH = 16, 2, 32


def regather() -> None:
    """As on a GPU."""
    from llmtrain.parallel import tensor

    tensor.regathers = lambda x: True


def regather_own_part() -> None:
    """The other ranks' parts of the sequence are this rank's own: broken on purpose."""
    from llmtrain.parallel import tensor

    regather()
    tensor.GatheredAgain.unpack = lambda self, kept: (
        kept if isinstance(kept, Tensor) else torch.cat([self.part_sBH] * self.group.size()).as_strided(*kept)
    )


def settled(live: LiveBytes) -> int:
    """Bytes that stay. A thread of gloo holds what it has sent for a moment longer than who waits for the sending."""
    deadline = time.monotonic() + 0.5
    least = live.num_bytes
    while time.monotonic() < deadline:
        time.sleep(0.02)
        least = min(least, live.num_bytes)
    return least


def block(rank: int, world_size: int, again: bool) -> tuple[int, int, list[Tensor]]:
    """Bytes that three column linears keep, gathers of the backward pass, and all gradients of one rank."""
    from llmtrain.parallel import cpu, tensor

    cpu.stand_in_for_cuda()
    tensor.regathers = lambda x: again
    generator = torch.Generator().manual_seed(rank)
    region = tensor.TensorRegion(dist.new_group(list(range(world_size))), sequence=True)
    linears = [tensor.ColumnLinear(nn.Linear(WIDTH, WIDTH, bias=False), region) for _ in range(3)]
    for number, linear in enumerate(linears):
        nn.init.normal_(linear.weight, generator=torch.Generator().manual_seed(number))
    x_sBH = torch.randn(LENGTH // world_size, BATCH, WIDTH, generator=generator).requires_grad_()
    with LiveBytes() as live:
        inner_SBH = region.enter(x_sBH * 1.0)
        outs = [linear(inner_SBH) for linear in linears]
        del inner_SBH
    kept = settled(live) - sum(out.nbytes for out in outs)
    gathers = []
    gather: Any = tensor.gather_from_sequence_parallel_region
    tensor.gather_from_sequence_parallel_region = lambda *args, **keys: (gathers.append(1), gather(*args, **keys))[1]
    weights = [linear.weight for linear in linears]
    total = torch.stack([(out * (1 + torch.arange(out.numel()).view_as(out) % 7)).sum() for out in outs]).sum()
    gradients = list(torch.autograd.grad(total, [x_sBH, *weights]))
    return kept, len(gathers), gradients


def test_a_part_is_kept_and_gathered_once_for_all_linears() -> None:
    whole, part = run_ranks(block, 2, False), run_ranks(block, 2, True)
    size = LENGTH * BATCH * WIDTH * 4
    assert [kept for kept, _, _ in whole] == [size, size]
    assert [kept for kept, _, _ in part] == [size // 2, size // 2]
    assert [gathers for _, gathers, _ in (*whole, *part)] == [0, 0, 1, 1]
    for (_, _, wanted), (_, _, found) in zip(whole, part, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("model", ["llama", "top_2"])
def test_layouts_that_gather_again_equal_one_process(model: str, recompute: str) -> None:
    config = parity_run(model).with_keys({"train.recompute": recompute})
    layout = config.with_keys({"engine": {"name": "megatron"}, "parallel": {"tensor": 2, "sequence": True}})
    assert verdict(config, layout, 2, num_steps=2, mutation=regather).problems == []


def test_a_wrong_second_gather_is_caught() -> None:
    config = parity_run("llama")
    layout = config.with_keys({"engine": {"name": "megatron"}, "parallel": {"tensor": 2, "sequence": True}})
    assert verdict(config, layout, 2, num_steps=2, mutation=regather_own_part).problems
