"""The torch engine on several ranks gives the numbers of one process, and what would break that is caught."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from llmtrain.engines import overlapped_sum, torch_engine
from llmtrain.engines.overlapped_sum import OverlappedSum
from llmtrain.engines.torch_engine import TorchEngine
from llmtrain.values.batch import IGNORED_LABEL, Batch
from tests.support.ranks import run_ranks
from tests.support.samples import random_batch, tiny_model, tiny_run

STEPS = 20
MICRO_BATCHES = 4


@dataclass(frozen=True)
class History:
    """What one rank saw."""

    first_weights: dict[str, torch.Tensor]
    last_weights: dict[str, torch.Tensor]
    losses: list[float]
    grad_norms: list[float]
    tokens: list[int]
    evaluation: tuple[float, int]
    num_fragments: int


def micro_batches(rank: int, world_size: int) -> list[Batch]:
    """Rank r's of every step's micro-batches, r, r + world size, ...: each has another number of targets."""
    batches = []
    for number in range(rank, MICRO_BATCHES, world_size):
        batch = random_batch(seed=number)
        batch.labels_BS[:, : 7 * number] = IGNORED_LABEL
        batches.append(batch)
    return batches


def train(rank: int, world_size: int, precision: str, spoil: str = "", overlap: bool = False) -> History:
    """Train the tiny model, with dropout; `spoil` breaks one thing."""
    if spoil == "gradients stay local":
        torch_engine.sum_over_ranks = lambda tensors, group: torch.distributed.all_reduce(tensors[-1])  # type: ignore[assignment]
    if spoil == "a bucket is left out":
        overlapped_sum.OverlappedSum._start = lambda self: setattr(self, "_next", self._next + 1)  # type: ignore[method-assign]  # on purpose
    optim: dict[str, Any] = {"lr": 1e-2}
    config = tiny_run(tiny_model(dropout=0.1), {"precision": precision}, optim)
    engine = TorchEngine(config.with_keys({"parallel.overlap_grad_reduce": overlap}), torch.device("cpu"))
    if spoil == "draws by local number":
        engine.place, engine.layout = replace(engine.place, data=0), replace(engine.layout, data=1)
    if spoil == "tokens counted locally":
        engine.sum_over_data = lambda count: count  # type: ignore[method-assign]
    first = weights(engine)
    results = [engine.train_step(step, micro_batches(rank, world_size), 1e-2) for step in range(1, STEPS + 1)]
    evaluation = engine.eval_step(micro_batches(rank, world_size))
    return History(
        first,
        weights(engine),
        [result.loss for result in results],
        [result.grad_norm for result in results],
        [result.num_tokens for result in results],
        (evaluation.loss_sum, evaluation.num_tokens),
        len(list(engine.fragments())),
    )


def weights(engine: TorchEngine) -> dict[str, torch.Tensor]:
    return {name: master.detach().clone() for name, master in engine.masters.items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def differences(one: History, many: History) -> list[str]:
    """How a run on several ranks departs from the levels of parity in fp32."""
    found = [] if equal(one.first_weights, many.first_weights) else ["weights before the first step"]
    found += [] if one.tokens == many.tokens else ["tokens"]
    for step, level in ((1, 1e-6), (STEPS, 1e-5)):
        if many.losses[step - 1] != pytest.approx(one.losses[step - 1], rel=level):
            found.append(f"loss at step {step}")
    found += [] if many.grad_norms == pytest.approx(one.grad_norms, rel=1e-5) else ["gradient norms"]
    return found


@pytest.fixture(scope="module")
def one() -> History:
    return run_ranks(train, 1, "fp32")[0]


@pytest.mark.parametrize("world_size", [2, 4])
def test_several_ranks_give_the_numbers_of_one(world_size: int, one: History) -> None:
    ranks = run_ranks(train, world_size, "fp32")
    assert one.losses[-1] < one.losses[0]
    for rank, history in enumerate(ranks):
        assert differences(one, history) == []
        assert equal(history.last_weights, ranks[0].last_weights), f"rank {rank} has other weights than rank 0"
        assert history.evaluation == (pytest.approx(one.evaluation[0], rel=1e-5), one.evaluation[1])
    assert [history.num_fragments for history in ranks] == [one.num_fragments] + [0] * (world_size - 1)


def overlapped(rank: int, world_size: int, precision: str, bucket_elements: int) -> tuple[History, list[bool]]:
    """A run whose gradients are summed meanwhile, and of each sum whether the last backward pass was still going on."""
    overlapped_sum.BUCKET_ELEMENTS = bucket_elements
    meanwhile: list[bool] = []
    start, finish, waiting = OverlappedSum._start, OverlappedSum.finish, [False]

    def noted_start(self: OverlappedSum) -> None:
        meanwhile.append(not waiting[0])
        start(self)

    def noted_finish(self: OverlappedSum) -> None:
        waiting[0] = True
        finish(self)
        waiting[0] = False

    OverlappedSum._start, OverlappedSum.finish = noted_start, noted_finish  # type: ignore[method-assign]  # only noted
    return train(rank, world_size, precision, overlap=True), meanwhile


@pytest.mark.parametrize("bucket_elements", [1 << 24, 3000])
@pytest.mark.parametrize(("precision", "world_size"), [("fp32", 2), ("fp32", 4), ("bf16", 2)])
def test_sums_meanwhile_are_those_afterwards(precision: str, world_size: int, bucket_elements: int) -> None:
    """Every bucket's sum begins before the backward pass ends. Of two ranks the bits are the same."""
    after = run_ranks(train, world_size, precision)[0]
    for meanwhile, early in run_ranks(overlapped, world_size, precision, bucket_elements):
        assert all(early)
        assert len(early) == STEPS if bucket_elements > 1 << 20 else len(early) > 3 * STEPS
        assert differences(after, meanwhile) == []
        if world_size == 2:
            assert meanwhile.losses == after.losses
            assert equal(meanwhile.last_weights, after.last_weights)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_follows_one_process(precision: str) -> None:
    one, two = run_ranks(train, 1, precision)[0], run_ranks(train, 2, precision)[0]
    assert two.losses[0] == pytest.approx(one.losses[0], rel=1e-6)
    assert two.losses == pytest.approx(one.losses, rel=1e-3)


@pytest.mark.parametrize(
    ("spoil", "caught"),
    [
        ("gradients stay local", "gradient norms"),
        ("a bucket is left out", "gradient norms"),
        ("draws by local number", "loss at step 1"),
        ("tokens counted locally", "tokens"),
    ],
)
def test_what_breaks_parity_is_caught(spoil: str, caught: str, one: History) -> None:
    assert caught in differences(one, run_ranks(train, 2, "fp32", spoil, spoil == "a bucket is left out")[0])
