"""Pruning in training: the same weights in every layout, and zeros that stay through training on and resume."""

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmtrain.checks.parity.batches import probe_batches
from llmtrain.checks.parity.compare import Pieces, Tensors, assemble, pieces
from llmtrain.config.parameters import pruned_linears
from llmtrain.config.schema import RunConfig
from llmtrain.engines import pruning
from llmtrain.engines.pruning import Pruning
from llmtrain.optim.table import OPTIMIZERS
from llmtrain.parallel.layout import plan_layout
from llmtrain.train.setup import engine_class
from llmtrain.values.fragment import Box
from tests.parity.cases import parity_run, short_and_whole, verdict
from tests.parity.test_deepspeed import small_pieces
from tests.parity.test_freeze import LAYOUTS as TWO_AND_FOUR
from tests.parity.test_freeze import PLACES
from tests.support.ranks import run_ranks

LAYOUTS = {**TWO_AND_FOUR, "deepspeed:dp3": ("deepspeed", 3, {}), "torch:dp1": ("torch", 1, {})}
"""Three ranks of ZeRO have groups of four between them."""

KINDS: dict[str, dict[str, Any]] = {
    "magnitude": {"kind": "magnitude", "sparsity": 0.5, "from_step": 2},
    "gradual": {"kind": "magnitude", "sparsity": 0.8, "from_step": 1, "until_step": 3, "every_steps": 1},
    "2:4": {"kind": "2:4", "from_step": 2},
    "some": {"kind": "magnitude", "sparsity": 0.3, "targets": ["attention.q", "mlp.down", "decoder.layers.1.*"]},
}
PRUNED_STEPS, MORE_STEPS = 3, 3
"""Behind the first, all kinds have pruned for the last time."""

GRID = [(kind, "llama", *place) for kind, place in zip(cycle(KINDS), PLACES, strict=False) if "dp4" not in place[0]]
PAIRWISE = [
    *(("magnitude", "llama", "megatron:tp2+sp", 1), ("2:4", "gpt", "deepspeed:dp3", 2)),
    *(("some", "gpt", "torch:dp2", 0), ("gradual", "top_2", "megatron:dp2+ep2", 1)),
]


def prune_run(kind: str, model: str = "llama", **keys: Any) -> RunConfig:
    """Six micro-batches, which one, two and three ranks share."""
    return parity_run(model).with_keys({"train.global_batch_size": 12, "prune": {**KINDS[kind], **keys}})


def laid_out(config: RunConfig, layout: str, stage: int) -> tuple[RunConfig, int]:
    engine, ranks, parallel = LAYOUTS[layout]
    return config.with_keys({"engine": {"name": engine, "zero_stage": stage}, "parallel": parallel}), ranks


@pytest.mark.parametrize(("kind", "model", "layout", "stage", "num_steps"), short_and_whole(PAIRWISE, GRID))
def test_fp32_equals_one_process(kind: str, model: str, layout: str, stage: int, num_steps: int) -> None:
    config = prune_run(kind, model)
    assert verdict(config, *laid_out(config, layout, stage), num_steps=num_steps).problems == []


class Held:
    """A checkpoint in memory: whole tensors by kind and name."""

    def __init__(self, tensors: dict[str, Tensors]) -> None:
        self.tensors = tensors

    def global_shape(self, name: str, kind: str) -> tuple[int, ...] | None:
        found = self.tensors[kind].get(name)
        return None if found is None else found.shape

    def read(self, name: str, kind: str, box: Box) -> Tensor:
        whole = self.tensors[kind][name]
        return torch.from_numpy(whole[box.slices_in(Box.whole(whole.shape))].copy())


def train_on(
    rank: int,
    size: int,
    config: RunConfig,
    steps: Sequence[int],
    held: Held | None,
    mutation: Callable[[], None] | None,
) -> dict[str, Pieces]:
    """Load, train some steps, and return what a checkpoint would hold."""
    if mutation:
        mutation()
    if config.engine.name == "deepspeed":
        small_pieces()
    engine = engine_class(config.engine.name)(config, torch.device("cpu"))
    if held:
        engine.load(held)
        engine.load_state({"updates": steps[0] - 1, "loss_scale": None})
    layout = plan_layout(config.parallel, size)
    for step in steps:
        batches = probe_batches(config, step, layout.coordinates(rank).data, layout.data)
        assert not engine.train_step(step, batches, 1e-3).skipped
    fragments = list(engine.fragments())
    kinds = ("master", *engine.row.moments)
    return {kind: pieces(fragment for fragment in fragments if fragment.kind == kind) for kind in kinds}


def trained(
    config: RunConfig, ranks: int, steps: Sequence[int], held: Held | None = None, mutation: Any = None
) -> dict[str, Tensors]:
    found = run_ranks(train_on, ranks, config, steps, held, mutation, timeout_seconds=120)
    return {kind: assemble([part[kind] for part in found]) for kind in found[0]}


def zeros_of(tensors: Tensors, config: RunConfig) -> dict[str, np.ndarray]:
    assert config.prune is not None
    names = [weight.name for _, weight in pruned_linears(config.model, config.prune.targets)]
    return {name: tensors[name] == 0 for name in names}


def same(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(mask, after[name]) for name, mask in before.items())


JOURNEYS = [
    ("magnitude", "megatron:tp2+sp", 1, "deepspeed:dp3", 3),
    pytest.param("2:4", "deepspeed:dp3", 3, "megatron:tp2", 0, marks=pytest.mark.whole_grid),
    pytest.param("gradual", "deepspeed:dp3", 2, "megatron:pp2", 1, marks=pytest.mark.whole_grid),
    pytest.param("2:4", "torch:dp2", 0, "deepspeed:tp2+sp", 1, marks=pytest.mark.whole_grid),
]


@pytest.mark.parametrize(("kind", "source", "source_stage", "target", "target_stage"), JOURNEYS)
def test_zeros_are_exact_and_stay_in_another_layout(
    kind: str, source: str, source_stage: int, target: str, target_stage: int
) -> None:
    config = prune_run(kind)
    assert config.prune is not None
    saved = trained(*laid_out(config, source, source_stage), range(1, PRUNED_STEPS + 1))
    zeros = zeros_of(saved["master"], config)
    for name, mask in zeros.items():
        assert mask.sum() == int(config.prune.sparsity_behind(PRUNED_STEPS) * mask.size), name
        assert all((saved[kind][name][mask] == 0).all() for kind in saved), f"{name} has moments"
        if config.prune.kind == "2:4":
            assert (mask.reshape(-1, 4).sum(1) == 2).all(), name
    others = set(saved["master"]) - set(zeros)
    assert all((saved["master"][name] != 0).mean() > 0.7 for name in others if name.endswith("word.weight"))
    steps = range(PRUNED_STEPS + 1, PRUNED_STEPS + MORE_STEPS + 1)
    after = trained(*laid_out(config, target, target_stage), steps, Held(saved))
    assert same(zeros, zeros_of(after["master"], config))
    moved = [name for name in zeros if not np.array_equal(saved["master"][name], after["master"][name])]
    assert len(moved) == len(zeros), "the others are trained on"


def test_zeros_that_a_run_begins_with_are_kept() -> None:
    pruned = trained(*laid_out(prune_run("magnitude"), "torch:dp1", 0), range(1, PRUNED_STEPS + 1))
    kept = prune_run("magnitude").with_keys({"prune": {"kind": "kept"}})
    after = trained(*laid_out(kept, "megatron:pp2", 1), (1, 2), Held(pruned))
    assert same(zeros_of(pruned["master"], kept), zeros_of(after["master"], kept))
    lost = kept.with_keys({"prune": None})
    free = trained(*laid_out(lost, "torch:dp1", 0), (1, 2), Held(pruned))
    assert not same(zeros_of(pruned["master"], kept), zeros_of(free["master"], kept)), "without the section they go"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_optimizer_moves_a_pruned_weight(name: str) -> None:
    config = prune_run("magnitude").with_keys({"optim": {"name": name, "lr": 1e-3}})
    early, late = (trained(*laid_out(config, "torch:dp1", 0), range(1, last + 1)) for last in (3, 6))
    assert same(zeros_of(early["master"], config), zeros_of(late["master"], config))


def gradients_stay() -> None:
    Pruning.keep_zeros = lambda self, step: None


def moments_stay() -> None:
    def set_zero(master: Any, pruned_N: Tensor) -> None:
        master.weight.view(-1).masked_fill_(pruned_N, 0.0)

    pruning._set_zero = set_zero


@pytest.mark.parametrize("mutation", [gradients_stay, moments_stay])
def test_zeros_that_are_lost_are_seen(mutation: Callable[[], None]) -> None:
    config = prune_run("magnitude")
    spoiled = trained(*laid_out(config, "torch:dp1", 0), range(1, PRUNED_STEPS + MORE_STEPS), mutation=mutation)
    zeros = zeros_of(spoiled["master"], config)
    assert any(mask.sum() < int(0.5 * mask.size) for mask in zeros.values())


def each_rank_prunes_its_own_share() -> None:
    pruning._add_over_ranks = lambda counts: counts.mul_(2)


def a_cut_group_knows_its_own_part_only() -> None:
    bits = pruning._Neighbours.bits
    pruning._Neighbours.bits = lambda self, *where: bits(self, *where).zero_()


@pytest.mark.parametrize(
    ("mutation", "kind", "layout", "stage"),
    [
        pytest.param(each_rank_prunes_its_own_share, "magnitude", "megatron:tp2", 0, marks=pytest.mark.whole_grid),
        (a_cut_group_knows_its_own_part_only, "2:4", "deepspeed:dp3", 3),
        pytest.param(gradients_stay, "magnitude", "megatron:dp2", 1, marks=pytest.mark.whole_grid),
    ],
)
def test_a_rule_that_is_broken_is_caught(mutation: Callable[[], None], kind: str, layout: str, stage: int) -> None:
    config = prune_run(kind)
    assert verdict(config, *laid_out(config, layout, stage), num_steps=4, mutation=mutation).problems
