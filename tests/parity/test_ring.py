"""A ring of context ranks in all that a run does, against one process; and code of it that is broken in one place."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmtrain.checks.parity.compare import LOW_PRECISION
from llmtrain.checks.parity.layouts import parse_candidate
from llmtrain.config.schema import RunConfig
from tests.parity.cases import SHORT_STEPS, parity_run, verdict
from tests.parity.resharding import Pair, differences, resharding_run
from tests.parity.test_reshard import LOSS_FP32, dataset, run_pair  # noqa: F401  # a fixture

whole = pytest.mark.whole_grid


def problems(
    config: RunConfig, text: str, mutation: Callable[[], None] | None = None, model: dict[str, Any] | None = None
) -> list[str]:
    """Where a layout, of a model with other keys, differs from one process."""
    config = config.with_keys({f"model.{key}": value for key, value in (model or {}).items()})
    layout = parse_candidate(text, config)
    assert layout.config.context_exchange == "ring"
    levels = {} if config.train.precision == "fp32" else {"levels": LOW_PRECISION}
    return verdict(config, layout.config, layout.world_size, SHORT_STEPS, mutation=mutation, **levels).problems


FEW_HEADS = {"num_heads": 2, "num_kv_heads": 1}
WINDOW = {"attention": {"kind": "sliding_window", "window": 7}, "position": "alibi"}


@pytest.mark.parametrize(
    ("text", "model"),
    [
        ("megatron:cp4+zero1", FEW_HEADS),  # as a matter of course: two heads are not for four ranks
        pytest.param("megatron:cp4+ring", WINDOW, marks=whole),
        pytest.param("megatron:cp4+ring", {"attention": {"kind": "strided", "stride": 3}}, marks=whole),
        pytest.param("megatron:cp2+ring", {"attention": {"kind": "bigbird", "block_size": 4}}, marks=whole),
        pytest.param("deepspeed:cp4+zero2", {**FEW_HEADS, "attention": {"sinks": True, "softcap": 5.0}}, marks=whole),
    ],
)
def test_other_heads_and_kinds_equal_one_process(text: str, model: dict[str, Any]) -> None:
    assert problems(parity_run("llama"), text, model=model) == []


@pytest.mark.parametrize(
    "kind", ["packed", "bf16", *(pytest.param(kind, marks=whole) for kind in ("selective", "full"))]
)
def test_documents_precision_and_recompute_equal_one_process(kind: str) -> None:
    text = "megatron:cp2+tp2+sp+ring" if kind == "full" else "megatron:cp2+ring+zero1"
    config = parity_run("dropout", "bf16" if kind == "bf16" else "fp32")
    config = config.with_keys({"data.reset_attention": kind == "packed"})
    if kind in ("selective", "full"):
        config = config.with_keys({"train.recompute": kind})
    assert problems(config, text) == []


@whole
def test_compiled_layers_change_nothing() -> None:
    config = parity_run("dropout")
    layout = parse_candidate("megatron:cp2+ring", config)
    compiled = layout.config.with_keys({"train.compile": True})
    assert verdict(config, compiled, layout.world_size).problems == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("megatron:cp2+ring+zero1", "deepspeed:cp2+zero2"),
        pytest.param("torch:dp1", "megatron:cp2+ring", marks=whole),
        pytest.param("megatron:cp2", "megatron:cp2+ring", marks=whole),
        pytest.param("deepspeed:cp2+ring+zero3", "torch:dp1", marks=whole),
    ],
)
def test_a_checkpoint_knows_nothing_of_it(before: str, after: str, dataset: Path, tmp_path: Path) -> None:  # noqa: F811
    """Bit for bit at the start, and the losses of the run that was never stopped."""
    source, target = (parse_candidate(text, resharding_run("llama", "fp32")).config for text in (before, after))
    pair = Pair("llama", source, target)
    saved, loaded = run_pair(pair, dataset, tmp_path, SHORT_STEPS)
    assert differences(saved, loaded, pair) == []
    losses = [[result.loss for result in outcomes[0].results] for outcomes in (saved, loaded)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=LOSS_FP32)
    assert len(losses[0]) == SHORT_STEPS


def leave_a_block_out() -> None:
    from llmtrain.models.attention.ring import Turn

    Turn.moves = lambda self, extent: self.ring.size - 2


def join_as_if_alone() -> None:
    """A rank's own keys count more than those of others."""
    from llmtrain.models.attention import ring

    right = ring.FusedBlocks.forward

    def forward(self: Any, *arguments: Any) -> Any:
        for rows, out, log_sum in right(self, *arguments):
            yield rows, out, log_sum + 1

    def uneven(self: Any, work: Any, *arguments: Any) -> Any:
        yield from (forward if work.queries == work.keys else right)(self, work, *arguments)

    ring.FusedBlocks.forward = uneven


def keep_the_gradients_of_others() -> None:
    from llmtrain.parallel.ring import Ring, Transfer

    right = Ring.shift
    Ring.shift = lambda self, block, by, kind: (
        right(self, block, by, kind) if kind == "blocks" else Transfer([], block, block)
    )


def label_in_order() -> None:
    """Labels, tokens and positions are cut in order, while attention takes them for balanced."""
    from llmtrain.parallel import parts

    right = parts.cut_sequence
    parts.cut_sequence = lambda length, place, count, balanced: right(length, place, count, False)


def draw_in_order() -> None:
    """Dropout takes a rank's positions for one run."""
    from llmtrain.parallel.parts import HeldPositions

    HeldPositions.places = lambda self, size, device: self.runs[0].start + torch.arange(size, device=device)


@pytest.mark.parametrize(
    ("mutation", "model", "named"),
    [
        pytest.param(leave_a_block_out, "llama", "loss of step 1", marks=whole),
        pytest.param(join_as_if_alone, "llama", "loss of step 1", marks=whole),
        pytest.param(keep_the_gradients_of_others, "llama", "gradient of decoder.layers", marks=whole),
        (label_in_order, "llama", "loss of step 1"),
        (draw_in_order, "dropout", "loss of step 1"),
    ],
)
def test_broken_code_is_caught(mutation: Callable[[], None], model: str, named: str) -> None:
    found = problems(parity_run(model), "megatron:cp2+ring", mutation)
    assert any(named in problem for problem in found), found
