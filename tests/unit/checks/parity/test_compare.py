"""How far two traces may be apart."""

import numpy as np
import pytest

from llmtrain.checks.parity.compare import FP32, Tensors, Trace, compare, worst_metric, worst_tensor
from llmtrain.values.progress import EvalResult, StepResult

FLOOR = 1e-6


def tensors(noise: float) -> dict[str, np.ndarray]:
    """A matrix of norm 10, and a vector that should be zero."""
    return {"weight": np.full((10, 10), 1.0, np.float32), "bias": np.full(4, noise / 2, np.float32)}


def test_a_tensor_is_measured_by_its_own_norm() -> None:
    other = tensors(0.0)
    other["weight"] = other["weight"] * np.float32(1.001)
    name, error = worst_tensor(tensors(0.0), other, FLOOR)
    assert name == "weight"
    assert error == pytest.approx(1e-3, rel=1e-2)


def test_noise_may_be_any_noise_and_no_more() -> None:
    assert worst_tensor(tensors(1e-9), tensors(-4e-6), FLOOR)[1] == 0.0
    name, error = worst_tensor(tensors(1e-9), tensors(1e-3), FLOOR)
    assert name == "bias"
    assert error > 1


def test_a_missing_tensor_is_infinitely_far() -> None:
    assert worst_tensor(tensors(0.0), {"bias": np.zeros(4, np.float32)}, FLOOR) == ("weight", float("inf"))


def test_expert_metrics_are_compared_and_others_are_not() -> None:
    reference = {"moe/aux_loss": 1.0, "loss_scale": 2.0}
    assert worst_metric(reference, {"moe/aux_loss": 1.0, "loss_scale": 4.0})[1] == 0.0
    assert worst_metric(reference, {"moe/aux_loss": 1.1})[1] == pytest.approx(0.1)
    assert worst_metric(reference, {}) == ("moe/aux_loss", float("inf"))


def trace(skipped: tuple[bool, ...] = (False,) * 3, spoiled: int | None = None, bias: float = 0.0) -> Trace:
    """Three steps of two tensors; of a skipped step, and of a `spoiled` one, the numbers are NaN."""
    steps, gradients = [], []
    for number, skip in enumerate(skipped):
        bad = skip or number == spoiled
        steps.append(StepResult(np.nan if bad else 2.0, np.nan if bad else 1.0, 64, skipped=skip))
        gradients.append({name: value * np.float32(np.nan if bad else 1.0) for name, value in tensors(0.0).items()})
    final: Tensors = tensors(bias)
    return Trace(steps, tensors(0.0), gradients, final, EvalResult(128.0, 64))


def test_equal_traces_have_no_problem() -> None:
    assert compare(trace(), trace(), FP32).problems == []


@pytest.mark.parametrize("spoiled", [0, 1, 2])
def test_a_number_that_is_none_is_seen_in_whatever_step(spoiled: int) -> None:
    """In Python neither NaN > 1 nor 1 > NaN: the largest of numbers with a NaN among them is any."""
    verdict = compare(trace(), trace(spoiled=spoiled), FP32)
    assert any(problem.startswith("gradient norm differs by nan") for problem in verdict.problems)
    assert any(problem.startswith("loss differs by nan") for problem in verdict.problems)
    assert np.isnan(verdict.gradient) and np.isnan(verdict.loss)
    other = {**tensors(0.0), "bias": np.full(4, np.nan, np.float32)}
    assert np.isnan(worst_tensor(tensors(0.0), other, FLOOR)[1]), "noise, and yet no number"


def test_layouts_that_only_skip_steps_are_not_equal() -> None:
    only = trace((True, True, True))
    verdict = compare(only, trace((True, True, True)), FP32)
    assert any("nothing is compared: each of the 3 steps was skipped" in problem for problem in verdict.problems)


def test_a_step_that_one_of_both_skips_is_named() -> None:
    verdict = compare(trace(), trace((False, True, False)), FP32)
    assert "step 2 is skipped in this layout only" in verdict.problems
    verdict = compare(trace((True, False, False)), trace(), FP32)
    assert "step 1 is skipped in one process only" in verdict.problems
