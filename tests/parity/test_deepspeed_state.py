"""What the deepspeed engine keeps: skipped steps leave no trace, fragments carry a run to another engine."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmtrain.checks.parity.compare import Pieces, Tensors, assemble, pieces, probe_batches
from llmtrain.config.schema import RunConfig
from llmtrain.engines.torch_engine import TorchEngine
from llmtrain.errors import LaunchError
from llmtrain.parallel.layout import plan_layout
from llmtrain.train.setup import engine_class
from llmtrain.values.fragment import Box
from llmtrain.values.progress import StepResult
from tests.parity.cases import parity_run
from tests.parity.test_deepspeed import small_pieces
from tests.parity.test_deepspeed import whole as whole_grid
from tests.support.ranks import RankError, run_ranks

CPU = torch.device("cpu")
KINDS = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Saved:
    """A source with whole tensors by kind and name."""

    tensors: dict[str, Tensors]

    def read(self, name: str, kind: str, box: Box) -> torch.Tensor:
        whole = self.tensors[kind][name]
        return torch.from_numpy(whole[box.slices_in(Box.whole(whole.shape))].copy())

    def global_shape(self, name: str, kind: str) -> tuple[int, ...] | None:
        return self.tensors[kind][name].shape if name in self.tensors[kind] else None


@dataclass(frozen=True)
class Run:
    """Steps `first` to `last`, from `saved` and `state` where they are given; step `spoiled` is not finite.

    `mutation` breaks something in the process of a rank.
    """

    config: RunConfig
    first: int
    last: int
    saved: Saved | None = None
    state: dict[str, Any] | None = None
    spoiled: int | None = None
    mutation: Callable[[], None] | None = None


@dataclass(frozen=True)
class Outcome:
    """What a rank has at the start and at the end of its steps."""

    results: list[StepResult]
    loaded: dict[str, Pieces]
    final: dict[str, Pieces]
    state: dict[str, Any]


def run_rank(rank: int, world_size: int, run: Run) -> Outcome:
    small_pieces()
    if run.mutation:
        run.mutation()
    layout = plan_layout(run.config.parallel, world_size)
    data = (layout.coordinates(rank).data, layout.data)
    return run_steps(engine_class(run.config.engine.name)(run.config, CPU), run, data)


def run_steps(engine: Any, run: Run, data: tuple[int, int]) -> Outcome:
    if run.saved:
        engine.load(run.saved)
    if run.state:
        engine.load_state(run.state)
    loaded = by_kind(engine)
    results = []
    for step in range(run.first, run.last + 1):
        handles = []
        if step == run.spoiled and data[0] == 0:  # one rank of the data axis, one of its micro-batches
            handles = [spoil(engine)]
        results.append(engine.train_step(step, probe_batches(run.config, step, *data), run.config.optim.lr))
        for handle in handles:
            handle.remove()
    return Outcome(results, loaded, by_kind(engine), engine.state())


def spoil(engine: Any) -> Any:
    """Make the gradient of the last block infinite, in the first micro-batch only."""
    module = engine.engine.module.model.decoder.layers["3"]
    left = [1]

    def infinite(_module: Any, _args: Any, output: tuple[torch.Tensor, Any]) -> None:
        x_sBH, _ = output
        if left and x_sBH.requires_grad:
            left.pop()
            x_sBH.register_hook(lambda grad: grad * math.inf)

    return module.register_forward_hook(infinite)


def by_kind(engine: Any) -> dict[str, Pieces]:
    fragments = list(engine.fragments())
    return {kind: pieces(f for f in fragments if f.kind == kind) for kind in KINDS}


def whole(outcomes: list[Outcome], when: str) -> dict[str, Tensors]:
    return {kind: assemble([getattr(outcome, when)[kind] for outcome in outcomes]) for kind in KINDS}


def assert_equal(a: dict[str, Tensors], b: dict[str, Tensors], tolerance: float = 0.0) -> None:
    for kind in KINDS:
        assert a[kind].keys() == b[kind].keys()
        for name, value in a[kind].items():
            difference = np.linalg.norm(value - b[kind][name])
            assert difference <= tolerance * np.linalg.norm(value), (kind, name, difference)


def deepspeed_run(precision: str, zero_stage: int, parallel: dict[str, Any], offload: str = "none") -> RunConfig:
    engine = {"name": "deepspeed", "zero_stage": zero_stage, "offload": offload}
    return parity_run("llama", precision).with_keys({"engine": engine, "parallel": parallel})


ROUND_TRIPS = [
    ("fp32", 2, {"tensor": 2, "sequence": True}, "none"),
    ("fp32", 3, {}, "none"),
    whole_grid("bf16", 3, {}, "cpu"),
    whole_grid("bf16", 0, {}, "none"),
    whole_grid("bf16", 1, {}, "none"),
    whole_grid("fp32", 0, {}, "none"),
    whole_grid("fp32", 1, {}, "none"),
    whole_grid("bf16", 2, {}, "none"),
    whole_grid("bf16", 3, {}, "none"),
    whole_grid("fp32", 2, {}, "cpu"),
]


@pytest.mark.parametrize(("precision", "zero_stage", "parallel", "offload"), ROUND_TRIPS)
def test_a_fresh_engine_continues_bit_for_bit(
    precision: str, zero_stage: int, parallel: dict[str, Any], offload: str
) -> None:
    config = deepspeed_run(precision, zero_stage, parallel, offload)
    straight = run_ranks(run_rank, 2, Run(config, 1, 4))
    half = run_ranks(run_rank, 2, Run(config, 1, 2))
    saved = whole(half, "final")
    rest = run_ranks(run_rank, 2, Run(config, 3, 4, Saved(saved), half[0].state))
    assert_equal(whole(rest, "loaded"), saved)
    assert [r.loss for r in rest[0].results] == [r.loss for r in straight[0].results[2:]]
    assert_equal(whole(rest, "final"), whole(straight, "final"))
    assert rest[0].state == straight[0].state == {"updates": 4, "loss_scale": None}


def test_another_engine_and_layout_continues() -> None:
    """From stage 3 on two tensor ranks to stage 1 on two data ranks, beside one process."""
    half = run_ranks(run_rank, 2, Run(deepspeed_run("fp32", 3, {"tensor": 2}), 1, 2))
    saved = Saved(whole(half, "final"))
    rest = run_ranks(run_rank, 2, Run(deepspeed_run("fp32", 1, {}), 3, 4, saved, half[0].state))
    alone = run_steps(TorchEngine(parity_run("llama"), CPU), Run(parity_run("llama"), 1, 4), (0, 1))
    assert_equal(whole([alone], "final"), whole(rest, "final"), tolerance=1e-4)


SPOILED = [
    ("fp32", 0, {}, "none"),
    ("fp32", 3, {}, "none"),
    ("bf16", 2, {}, "cpu"),
    whole_grid("fp32", 3, {"tensor": 2, "sequence": True}, "none"),
    whole_grid("fp32", 2, {}, "none"),
    whole_grid("bf16", 1, {}, "none"),
    whole_grid("fp32", 3, {}, "cpu"),
    whole_grid("bf16", 0, {}, "none"),
    whole_grid("fp32", 1, {}, "none"),
    whole_grid("bf16", 2, {"tensor": 2}, "none"),
    whole_grid("bf16", 3, {}, "none"),
    whole_grid("fp32", 1, {}, "cpu"),
    whole_grid("fp32", 2, {}, "cpu"),
]


@pytest.mark.parametrize(("precision", "zero_stage", "parallel", "offload"), SPOILED)
def test_a_step_that_is_not_finite_leaves_no_trace(
    precision: str, zero_stage: int, parallel: dict[str, Any], offload: str
) -> None:
    """Steps 1, 2 (spoiled), 3 are steps 1 and 3 in all but the number of the step, on every rank."""
    config = deepspeed_run(precision, zero_stage, parallel, offload)
    spoiled = run_ranks(run_rank, 2, Run(config, 1, 3, spoiled=2))
    for outcome in spoiled:
        assert [result.skipped for result in outcome.results] == [False, True, False]
        assert not math.isfinite(outcome.results[1].grad_norm)
        assert outcome.state["updates"] == 2
    first = run_ranks(run_rank, 2, Run(config, 1, 1))
    third = run_ranks(run_rank, 2, Run(config, 3, 3, Saved(whole(first, "final")), first[0].state))
    assert spoiled[0].results[2] == third[0].results[0]
    assert_equal(whole(spoiled, "final"), whole(third, "final"))


def forget_to_drop() -> None:
    from llmtrain.engines.deepspeed_engine.zero1_2 import Partitions

    Partitions.drop = lambda self: None


def test_gradients_that_are_not_dropped_are_seen() -> None:
    config = deepspeed_run("bf16", 2, {})
    spoiled = run_ranks(run_rank, 2, Run(config, 1, 3, spoiled=2, mutation=forget_to_drop))
    assert [result.skipped for result in spoiled[0].results] == [False, True, True]


def nvme_rank(rank: int, world_size: int) -> bool:
    from llmtrain.engines.deepspeed_engine.setup import can_offload_to_nvme

    return can_offload_to_nvme()


def nvme_run(folder: Path) -> RunConfig:
    """A run with groups that are large enough to be swapped: 1 MiB and more."""
    config = deepspeed_run("fp32", 3, {}, "nvme")
    return config.with_keys({"engine.nvme_path": str(folder), "model.hidden_size": 128})


def test_nvme_offload_works_or_says_what_is_missing(tmp_path: Path) -> None:
    """Where libaio is, two steps, a fresh engine and a skipped step; where not, the error."""
    config = nvme_run(tmp_path)
    if not run_ranks(nvme_rank, 1)[0]:
        with pytest.raises(RankError, match=f"{LaunchError.__name__}: engine.offload = nvme: needs libaio"):
            run_ranks(run_rank, 1, Run(config, 1, 1))
        return
    half = run_ranks(run_rank, 2, Run(config, 1, 2), timeout_seconds=400)
    assert list(tmp_path.rglob("exp_avg*.swp"))
    saved = whole(half, "final")
    rest = run_ranks(run_rank, 2, Run(config, 3, 5, Saved(saved), half[0].state, spoiled=4))
    assert_equal(whole(rest, "loaded"), saved)
    assert [result.skipped for result in rest[0].results] == [False, True, False]
    in_memory = config.with_keys({"engine.offload": "none"})
    same = run_ranks(run_rank, 2, Run(in_memory, 3, 5, Saved(saved), half[0].state, spoiled=4))
    assert_equal(whole(rest, "final"), whole(same, "final"))
