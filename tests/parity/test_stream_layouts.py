"""Packing, a mixture that changes, limits and a ramp of the batch, on two ranks of every engine and across a resume."""

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from launch.rank.rendezvous import TorchRankStore
from llmtrain.checkpoint.manager import CheckpointManager
from llmtrain.checkpoint.reader import open_checkpoint
from llmtrain.config.budget import Budget
from llmtrain.config.rules.arithmetic import arithmetic_problems
from llmtrain.config.schema import CheckpointConfig, RunConfig
from llmtrain.optim.schedule import learning_rate
from llmtrain.preflight.resolve import resolve
from llmtrain.train.setup import build_loader
from llmtrain.train.state import Saving, TrainState, restore
from tests.parity.resharding import build_engine
from tests.support.datasets import UNREAD_TOKENIZER, random_documents, write_dataset
from tests.support.ranks import run_ranks
from tests.support.samples import tiny_model, tiny_run

HALF, WHOLE = 3, 6
ENGINES: list[dict[str, Any]] = [
    {"name": "torch"},
    {"name": "megatron", "zero_stage": 1},
    {"name": "deepspeed", "zero_stage": 2},
]
Step = tuple[float, float, int]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("stream")
    for number in range(2):
        shards = [random_documents(30, 10 * number + shard, longest=45) for shard in range(2)]
        write_dataset(folder / str(number), shards, tokenizer=UNREAD_TOKENIZER)
    ramp = [{"from_step": 3, "global_batch_size": 8}, {"from_step": 5, "global_batch_size": 12}]
    run = tiny_run(tiny_model(), {"steps": WHOLE, "global_batch_size": 4, "micro_batch_size": 2, "batch_ramp": ramp})
    sources = [{"path": str(folder / "0"), "max_samples": 12}, {"path": str(folder / "1")}]
    schedule = [{"from_step": 4, "weights": [2, 1]}]
    data = {"train": sources, "schedule": schedule, "packing": "best_fit", "reset_attention": True, "seq_len": 32}
    keys = {"data": data, "output_dir": str(folder / "runs"), "data.cache_dir": str(folder / "cache")}
    found = run.with_keys({**keys, "data": {**data, "cache_dir": str(folder / "cache")}})
    assert arithmetic_problems(found, 2) == []
    return found


def train(
    rank: int, world_size: int, config: RunConfig, until: int, folder: Path, resume: Path | None = None
) -> list[Step]:
    """Steps up to `until`, which is saved; loss, norm and targets of each."""
    engine = build_engine(config)
    state = restore(open_checkpoint(resume, verify=rank == 0), engine) if resume else TrainState()
    loader = build_loader(resolve(config), "train", rank).sized(config.train.batch_sizes)
    steps, budget, found = loader.steps(state.samples, state.step + 1), Budget.of(config), []
    while state.step < until:
        step = state.step + 1
        result = engine.train_step(step, next(steps), learning_rate(step, config.optim, WHOLE))
        moved = loader.step_length(state.samples, step)
        state = state.advanced(moved, result.num_tokens, budget.tokens_of(step))
        found.append((result.loss, result.grad_norm, result.num_tokens))
    steps.close()
    exchange = None
    if world_size > 1:
        store = dist.FileStore(str(folder / "said"), world_size)  # pyright: ignore[reportPrivateImportUsage]
        exchange = TorchRankStore(store, rank, world_size, timeout_seconds=60)
    manager = CheckpointManager(folder / "checkpoints", CheckpointConfig(), "name: x\n", {}, ranks=exchange)
    saving = Saving(manager, 1, lambda: None)
    saving.save(state, engine, None)
    saving.finish()
    return found


@pytest.fixture(scope="module")
def alone(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> list[Step]:
    folder = tmp_path_factory.mktemp("alone")
    return run_ranks(train, 1, config, WHOLE, folder)[0]


def test_a_pipeline_takes_as_many_micro_batches_as_the_batch_has(
    config: RunConfig, alone: list[Step], tmp_path: Path
) -> None:
    piped = config.with_keys({"engine": {"name": "megatron"}, "parallel.pipeline": 2, "launch.num_workers": 2})
    found = run_ranks(train, 2, piped, WHOLE, tmp_path, timeout_seconds=120)[0]
    assert [step[2] for step in found] == [step[2] for step in alone]
    for expected, actual in zip(alone, found, strict=True):
        assert actual[:2] == pytest.approx(expected[:2], rel=2e-5)


@pytest.mark.parametrize("number", range(3), ids=[engine["name"] for engine in ENGINES])
def test_two_ranks_and_another_engine_after_a_resume(
    config: RunConfig, alone: list[Step], tmp_path: Path, number: int
) -> None:
    first, second = (
        config.with_keys({"engine": ENGINES[(number + more) % 3], "launch.num_workers": 2}) for more in (0, 1)
    )
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    found = run_ranks(train, 2, first, HALF, tmp_path / "first", timeout_seconds=120)[0]
    checkpoint = tmp_path / "first" / "checkpoints" / f"step-{HALF:08d}"
    found += run_ranks(train, 2, second, WHOLE, tmp_path / "second", checkpoint, timeout_seconds=120)[0]
    assert [step[2] for step in found] == [step[2] for step in alone]
    for expected, actual in zip(alone, found, strict=True):
        assert actual[:2] == pytest.approx(expected[:2], rel=2e-5)
    assert len({step[2] for step in alone}) == WHOLE, "steps have padding and different sizes"
