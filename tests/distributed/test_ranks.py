"""The fork server of tests: results by rank, errors with the rank's traceback, and nothing that hangs or stays."""

import os
import signal
import time

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.support.ranks import RankError, run_ranks


def summed(rank: int, world_size: int, offset: int) -> tuple[float, int, int]:
    total = torch.tensor(float(rank + offset))
    dist.all_reduce(total)
    return total.item(), torch.get_num_threads(), os.getpid()


def one_raises(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("spoiled on purpose")
    dist.barrier()


def one_is_killed(rank: int, world_size: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def one_sleeps(rank: int, world_size: int) -> None:
    if rank == 1:
        time.sleep(60)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_come_back_by_rank(world_size: int) -> None:
    results = run_ranks(summed, world_size, 10)
    expected = sum(rank + 10 for rank in range(world_size))
    assert [(total, threads) for total, threads, _ in results] == [(expected, 1)] * world_size
    assert not any(psutil.pid_exists(process) for _, _, process in results)


def test_the_error_is_that_of_the_rank_that_raised() -> None:
    with pytest.raises(RankError, match=r"rank 1 of 2:\n(?s:.*)in one_raises(?s:.*)ValueError: spoiled on purpose"):
        run_ranks(one_raises, 2)


def test_a_killed_rank_is_named() -> None:
    with pytest.raises(RankError, match="rank 1 of 2 was killed"):
        run_ranks(one_is_killed, 2)


def test_ranks_that_hang_are_ended() -> None:
    with pytest.raises(RankError, match=r"ranks \[1\] were not done in time"):
        run_ranks(one_sleeps, 2, timeout_seconds=1.0)
