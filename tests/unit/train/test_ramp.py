"""Runs whose batch grows, and whose budget may be in tokens: stopped anywhere, they go on as if they were not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmtrain.config.schema import RunConfig
from tests.support.small_runs import rows_of, small_run, train_here, write_data

RAMP = [{"from_step": 4, "global_batch_size": 8}, {"from_step": 7, "global_batch_size": 12}]
SIZES = [4, 4, 4, 8, 8, 8, 12, 12]
SAME = ("step", "loss", "grad_norm", "lr", "tokens", "samples", "valid_loss")


def ramped(folder: Path, **train: Any) -> RunConfig:
    sections = {"train": {"batch_ramp": RAMP, **train}, "evaluate": {"every_steps": 4, "steps": 2}}
    optim = {"warmup_steps": 4, "lr": 1e-3}
    return small_run(folder, **sections, checkpoint={"every_steps": 2}, optim=optim)


def told(config: RunConfig) -> list[dict[str, Any]]:
    return [{key: row.get(key) for key in SAME} for row in rows_of(config)]


@pytest.mark.parametrize("train", [{"steps": 8}, {"steps": None, "tokens": 55 * 32}], ids=["steps", "tokens"])
def test_a_run_that_is_stopped_goes_on_with_the_sizes_of_its_steps(tmp_path: Path, train: dict[str, Any]) -> None:
    """55 samples in all: the eighth step is the first that reaches them."""
    for name in ("whole", "stopped"):
        write_data(tmp_path / name)
    whole = ramped(tmp_path / "whole", **train)
    assert train_here(whole) == 0
    rows = [row for row in rows_of(whole) if "loss" in row]
    assert [row["samples"] for row in rows] == [sum(SIZES[: step + 1]) for step in range(8)]
    warm = [1, 2, 3, 5] if "tokens" in train else [1, 2, 3, 4]  # places in steps of the first one's size, of 4 samples
    rates = [row["lr"] / 1e-3 for row in rows[:4]]
    assert rates[:3] == pytest.approx([place / 4 for place in warm[:3]])
    assert (rates[3] < 1) == ("tokens" in train), "a fifth step's rate, behind the warm-up"
    stopped = ramped(tmp_path / "stopped", **train)
    for step in (4, 6, 8):  # after a checkpoint each, of which some steps are lost
        with pytest.raises(_Crash):
            train_here(stopped, lambda run, rank, step=step: replace(run, engine=_Mortal(run.engine, step)))
    assert train_here(stopped) == 0
    assert told(stopped) == told(whole)


class _Crash(Exception):
    pass


class _Mortal:
    """An engine that fails in a step."""

    def __init__(self, engine: Any, step: int) -> None:
        self._engine, self._step = engine, step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def train_step(self, step: int, micro_batches: Any, lr: float) -> Any:
        if step == self._step:
            raise _Crash
        return self._engine.train_step(step, micro_batches, lr)
