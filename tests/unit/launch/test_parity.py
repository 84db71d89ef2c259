"""How far two traces may be apart."""

import numpy as np
import pytest

from launch.parity import worst_metric, worst_tensor

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
