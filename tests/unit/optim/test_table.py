"""The table of optimizers: what each keeps, and what a checkpoint of another one is told to be."""

from typing import Any, get_args

import pytest
import torch

from llmtrain.config.schema import OptimConfig
from llmtrain.engines.masters import make_state, set_updates
from llmtrain.engines.torch_engine import TorchEngine
from llmtrain.errors import CheckpointError
from llmtrain.optim.lion import Lion
from llmtrain.optim.table import OPTIMIZERS, row_of
from llmtrain.values.fragment import Box, Fragment
from tests.support.samples import random_batch, tiny_model, tiny_run

CPU = torch.device("cpu")


class Held:
    """Fragments of an engine as a source."""

    def __init__(self, engine: TorchEngine) -> None:
        self._tensors = {(f.name, f.kind): f.tensor.clone() for f in engine.fragments()}

    def read(self, name: str, kind: str, box: Box) -> torch.Tensor:
        return self._tensors[name, kind][box.slices_in(Box.whole(self._tensors[name, kind].shape))]

    def global_shape(self, name: str, kind: str) -> tuple[int, ...] | None:
        return tuple(self._tensors[name, kind].shape) if (name, kind) in self._tensors else None


def engine_with(optimizer: str) -> TorchEngine:
    optim: dict[str, Any] = {"name": optimizer, "lr": 1e-3}
    return TorchEngine(tiny_run(tiny_model(), {"precision": "bf16"}, optim), CPU)


def test_the_table_has_every_optimizer_of_the_schema() -> None:
    assert set(OPTIMIZERS) == set(get_args(OptimConfig.model_fields["name"].annotation))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_row_says_what_the_optimizer_keeps(name: str) -> None:
    """What its first step makes of itself is what the row says, and what is made before the first step."""
    row, states = OPTIMIZERS[name], []
    for made_before in (False, True):
        weight = torch.zeros(3, 2, requires_grad=True)
        weight.grad = torch.ones(3, 2)
        optimizer = row.build([{"params": [weight], "weight_decay": 0.1}], OptimConfig(name=name))  # type: ignore[arg-type]
        if made_before:
            make_state(optimizer, row, [weight])
            set_updates(optimizer, 0)
        optimizer.step()
        states.append((dict(optimizer.state[weight]), weight.detach().clone()))
        moments = {key: value for key, value in states[-1][0].items() if key != "step"}
        assert {key: tuple(value.shape) for key, value in moments.items()} == {
            moment: row.moment_shape(moment, (3, 2)) for moment in row.moments
        }
        assert ("step" in states[-1][0]) == row.counts_updates
    assert torch.equal(states[0][1], states[1][1])
    assert row.stored_bytes == 4 * (1 + len(row.moments))


def test_lion_is_the_paper_s() -> None:
    """Algorithm 2 by hand, in fp64, over some steps."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(5, 3, generator=generator)
    expected, momentum = weight.double(), torch.zeros(5, 3, dtype=torch.float64)
    weight.requires_grad_()
    optimizer = Lion([{"params": [weight], "weight_decay": 0.3}], lr=0.01, betas=(0.9, 0.99))
    for _ in range(5):
        grad = torch.randn(5, 3, generator=generator)
        weight.grad = grad.clone()
        optimizer.step()
        update = (0.9 * momentum + 0.1 * grad.double()).sign()
        expected = expected - 0.01 * (update + 0.3 * expected)
        momentum = 0.99 * momentum + 0.01 * grad.double()
    torch.testing.assert_close(weight.detach().double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(optimizer.state[weight]["exp_avg"].double(), momentum, atol=1e-6, rtol=0)


def test_a_checkpoint_of_another_optimizer_is_told_as_that() -> None:
    lion, adamw = engine_with("lion"), engine_with("adamw")
    lion.train_step(1, [random_batch()], 1e-3)
    with pytest.raises(CheckpointError, match=r"optim\.name = adamw: .* no exp_avg_sq of .*another optimizer"):
        adamw.load(Held(lion))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_saved_continues(name: str) -> None:
    first, second = engine_with(name), engine_with(name)
    assert first.row is row_of(first.config.optim) is OPTIMIZERS[name]
    for step in (1, 2):
        first.train_step(step, [random_batch(step)], 1e-3)
    second.load(Held(first))
    second.load_state(first.state())
    results = [engine.train_step(3, [random_batch(3)], 1e-3) for engine in (first, second)]
    assert results[0] == results[1] and first.state() == second.state() == {"updates": 3, "loss_scale": None}

    def last(engine: TorchEngine) -> dict[tuple[str, str], Fragment]:
        return {(f.name, f.kind): f for f in engine.fragments()}

    for key, fragment in last(first).items():
        assert torch.equal(fragment.tensor, last(second)[key].tensor), key


def test_the_count_of_older_checkpoints_is_read() -> None:
    engine = engine_with("adamw")
    engine.load_state({"adam_steps": 7, "loss_scale": None})
    assert engine.state()["updates"] == 7
    assert all(int(state["step"]) == 7 for state in engine.optimizer.state.values())
