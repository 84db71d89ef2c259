"""The table of engines: it names every engine of the schema, classes that are there, and what rules keep to."""

from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import get_args

import pytest

from llmtrain.config.engines import ENGINES, EngineName, EngineRow, engines_that
from llmtrain.config.schema import EngineConfig, OptimConfig, ParallelConfig
from tests.unit.config.small_run import broken, run


def test_every_engine_has_a_row() -> None:
    assert list(ENGINES) == list(get_args(EngineName))
    assert EngineConfig.model_fields["name"].annotation == EngineName


@pytest.mark.parametrize("row", ENGINES.values(), ids=ENGINES)
def test_a_row_names_a_class_and_keys_of_the_schema(row: EngineRow) -> None:
    module = find_spec(row.module)
    assert module is not None and module.origin is not None
    assert row.class_name in Path(module.origin).read_text(), "importing it would take seconds"
    assert set(row.axes) <= set(ParallelConfig.model_fields)
    assert set(row.offloads) <= set(get_args(EngineConfig.model_fields["offload"].annotation)) - {"none"}
    names = get_args(OptimConfig.model_fields["name"].annotation)
    assert row.optimizers and set(row.optimizers) <= set(names)
    for stages in (row.gpu_fp16_stages, row.whole_expert_stages, *row.offloads.values()):
        assert set(stages) <= set(row.zero_stages)


@pytest.mark.parametrize(("name", "axis"), product(ENGINES, ("tensor", "context", "pipeline", "expert")))
def test_rules_allow_the_axes_of_the_row(name: str, axis: str) -> None:
    moe = {"num_experts": 4} if axis == "expert" else None
    found = broken(run(engine={"name": name}, parallel={axis: 2}, model={"moe": moe}), world_size=2)
    assert (f"parallel.{axis}" in found) == (axis not in ENGINES[name].axes), found


@pytest.mark.parametrize(("name", "stage"), product(ENGINES, range(4)))
def test_rules_allow_the_zero_stages_and_offloads_of_the_row(name: str, stage: int) -> None:
    row = ENGINES[name]
    found = broken(run(engine={"name": name, "zero_stage": stage}), world_size=2)
    assert ("engine.zero_stage" in found) == (stage not in row.zero_stages), found
    for offload, path in (("cpu", None), ("nvme", "/tmp/x")):
        settings = {"name": name, "zero_stage": stage, "offload": offload, "nvme_path": path}
        found = broken(run(engine=settings), world_size=2)
        assert ("engine.offload" in found) == (stage not in row.offloads.get(offload, ())), found


@pytest.mark.parametrize("name", ENGINES)
def test_rules_allow_what_the_row_does_not_explain_away(name: str) -> None:
    row = ENGINES[name]
    compiled = broken(run(engine={"name": name}, train={"compile": True}))
    assert ("train.compile" in compiled) == bool(row.no_compile)


def test_engines_are_suggested_in_the_order_of_the_table() -> None:
    assert engines_that(lambda row: "tensor" in row.axes) == ["megatron", "deepspeed"]
    assert engines_that(lambda row: not row.platforms) == ["torch"]
