"""All ranks of every engine end a run that stops early behind the same step, and an attempt after it has nothing to do.

The first evaluation is an improvement, as there is none before it, and no later one falls by so much.
"""

from pathlib import Path
from typing import Any

import pytest

from llmtrain.checkpoint.folders import checkpoint_steps
from llmtrain.config.data import DataSetConfig
from llmtrain.config.schema import CheckpointConfig, EvaluateConfig, RunConfig
from llmtrain.preflight.dry_run import find_continuation, plan_dry_run
from llmtrain.preflight.resolve import resolve
from tests.support.bad_numbers import Fault, bad_run, run_rank
from tests.support.datasets import UNREAD_TOKENIZER, random_documents, write_dataset
from tests.support.ranks import run_ranks

whole_grid = pytest.mark.whole_grid


def stopping_run(folder: Path, layout: tuple[str, int, dict[str, Any]]) -> RunConfig:
    write_dataset(folder / "data", [random_documents(60, 0)], tokenizer=UNREAD_TOKENIZER)
    config = bad_run(folder, layout, steps=20)
    valid = (DataSetConfig(path=str(folder / "data")),)
    evaluate = EvaluateConfig(every_steps=2, steps=1, stop_after=2, min_improvement=100.0)
    return config.with_keys(
        {
            "data.valid": valid,
            "evaluate": evaluate,
            "checkpoint": CheckpointConfig(every_steps=2, keep=1, keep_best=True),
        }
    )


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(("torch", 2, {}), id="torch-dp2", marks=whole_grid),
        pytest.param(("megatron-1", 4, {"tensor": 2, "pipeline": 2}), id="megatron-zero1-tp2-pp2"),
        pytest.param(("megatron", 2, {"context": 2}), id="megatron-cp2", marks=whole_grid),
        pytest.param(("deepspeed-3", 2, {}), id="deepspeed-zero3", marks=whole_grid),
    ],
)
def test_all_ranks_end_alike(tmp_path: Path, layout: tuple[str, int, dict[str, Any]]) -> None:
    config = stopping_run(tmp_path, layout)
    ranks = run_ranks(run_rank, layout[1], config, Fault(), timeout_seconds=180)
    assert [[step for step, _, _ in seen.calls] for seen in ranks] == [list(range(1, 7))] * layout[1]
    assert 6 in checkpoint_steps(config.run_dir / "checkpoints")
    assert plan_dry_run(resolve(config), find_continuation(config)).stopped_early
