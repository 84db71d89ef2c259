"""Which worker a rank gets, and how many ranks a run may have."""

from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.on_ray.ranking import legal_sizes, seat_ranks
from llmtrain.config.reading.load import load_config
from llmtrain.config.schema import ParallelConfig, RunConfig
from llmtrain.parallel.layout import plan_layout
from tests.support.run_files import write_good_run

MEGATRON = ["engine.name=megatron"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_good_run(tmp_path)
    return tmp_path


def run(folder: Path, *overrides: str) -> RunConfig:
    return load_config(folder / "run.yaml", overrides).config


def test_sizes_keep_the_layout_and_divide_the_batch(folder: Path) -> None:
    sizes = ["train.global_batch_size=24", "train.micro_batch_size=2"]
    elastic = run(folder, *sizes, "launch.backend=ray", "launch.num_workers=12", "launch.min_workers=2")
    # 24 / 2 = 12 micro-batches: these numbers of ranks divide them.
    assert legal_sizes(elastic) == [12, 6, 4, 3, 2]
    pairs = [*MEGATRON, "parallel.tensor=2", "launch.backend=ray", "launch.num_workers=8", "launch.min_workers=2"]
    assert legal_sizes(run(folder, *sizes, *pairs)) == [8, 6, 4, 2]


def test_a_run_that_may_not_shrink_has_one_size(folder: Path) -> None:
    assert legal_sizes(run(folder, "launch.backend=ray", "launch.num_workers=2")) == [2]


def test_a_tensor_group_shares_a_machine(folder: Path) -> None:
    config = run(folder, *MEGATRON, "parallel.tensor=2", "parallel.pipeline=2", "launch.num_workers=4")
    config = config.with_keys({"launch.num_workers": 8})
    # Ray has mixed the machines of both replicas' workers.
    machines = [["b", "a", "b", "a"], ["c", "d", "d", "c"]]
    seats = seat_ranks(config, machines)
    homes = [machines[seat.replica][seat.bundle] for seat in seats]
    layout = plan_layout(config.parallel, 8)
    for group in layout.groups("tensor"):
        assert len({homes[rank] for rank in group}) == 1
    for rank, seat in enumerate(seats):
        assert seat.replica == [0, 1][layout.coordinates(rank).data]


@given(data=st.data())
def test_every_worker_has_one_rank_and_local_ranks_count_a_machine(data: st.DataObject) -> None:
    tensor, pipeline, replicas = (data.draw(st.integers(1, 3)) for _ in range(3))
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline)
    config = RunConfig.model_construct(parallel=parallel)
    names = st.sampled_from("abcd")
    machines = [[data.draw(names) for _ in range(tensor * pipeline)] for _ in range(replicas)]
    seats = seat_ranks(config, machines)
    workers = [(seat.replica, seat.bundle) for seat in seats]
    assert sorted(workers) == [(replica, bundle) for replica in range(replicas) for bundle in range(tensor * pipeline)]
    for machine in set(chain.from_iterable(machines)):
        here = [seat for seat in seats if machines[seat.replica][seat.bundle] == machine]
        assert [seat.local_rank for seat in here] == list(range(len(here)))
        assert all(seat.local_world_size == len(here) for seat in here)
    by_replica = [
        {
            seat.replica
            for seat, rank in zip(seats, range(len(seats)), strict=True)
            if plan_layout(parallel, len(seats)).coordinates(rank).data == at
        }
        for at in range(replicas)
    ]
    assert all(len(found) == 1 for found in by_replica)
