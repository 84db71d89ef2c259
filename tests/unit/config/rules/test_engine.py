"""What each engine can do: what is refused names the fix, and the fix is accepted."""

from dataclasses import replace
from typing import Any, get_args

import pytest

from llmtrain.config.engines import ENGINES
from llmtrain.config.schema import OptimConfig, RunConfig
from tests.unit.config.small_run import broken, run

MEGATRON, DEEPSPEED = {"name": "megatron"}, {"name": "deepspeed"}
NVME = {**DEEPSPEED, "zero_stage": 3, "offload": "nvme", "nvme_path": "/tmp/x"}


@pytest.mark.parametrize(
    ("sections", "key", "says"),
    [
        ({"parallel": {"tensor": 2}}, "parallel.tensor", "Try 1, or engine.name=megatron or deepspeed."),
        ({"parallel": {"context": 2}}, "parallel.context", "splits the batch only. Try 1, or engine.name="),
        ({"parallel": {"pipeline": 2}}, "parallel.pipeline", "Try 1, or engine.name=megatron."),
        ({"engine": {"zero_stage": 1}}, "engine.zero_stage", "Try 0, or engine.name=megatron or deepspeed."),
        ({"engine": {"zero_stage": 2}}, "engine.zero_stage", "Try 0, or engine.name=deepspeed."),
        ({"engine": {"offload": "cpu"}}, "engine.offload", "Try none, or engine.name=deepspeed."),
        ({"engine": {**MEGATRON, "offload": "cpu"}}, "engine.offload", "engine.name = megatron does not offload"),
        ({"engine": {**MEGATRON, "zero_stage": 2}}, "engine.zero_stage", "Try 1, or engine.name=deepspeed."),
        (
            {"engine": {**MEGATRON, "zero_stage": 3}, "parallel": {"pipeline": 2}},
            "engine.zero_stage",
            "ZeRO 2 and 3 do not go with a pipeline (parallel.pipeline = 2)",
        ),
        (
            {"engine": DEEPSPEED, "parallel": {"pipeline": 2}},
            "parallel.pipeline",
            "no pipeline. Try 1, or engine.name=megatron.",
        ),
        (
            {"engine": {**DEEPSPEED, "zero_stage": 2}, "parallel": {"pipeline": 2}},
            "parallel.pipeline",
            "engine.name=megatron with engine.zero_stage=1: ZeRO 2 and 3 do not go with a pipeline.",
        ),
        ({"engine": {**DEEPSPEED, "offload": "cpu"}}, "engine.offload", "Try engine.zero_stage=2."),
        ({"engine": {**NVME, "zero_stage": 2}}, "engine.offload", "Try engine.zero_stage=3, or cpu."),
        ({"engine": {**NVME, "nvme_path": None}}, "engine.offload", "Try engine.nvme_path="),
        ({"engine": {**NVME, "offload": "cpu"}}, "engine.nvme_path", "Try null, or engine.offload=nvme."),
        (
            {
                "engine": {**DEEPSPEED, "zero_stage": 1},
                "train": {"precision": "fp16"},
                "launch": {"device": "cpu"},
            },
            "launch.device",
            "engine.name = deepspeed has no fp16 on the CPU. Try train.precision=bf16, or engine.name=megatron.",
        ),
        (
            {"engine": DEEPSPEED, "parallel": {"overlap_grad_reduce": True}},
            "parallel.overlap_grad_reduce",
            "Try false, engine.zero_stage 1, 2 or 3, or engine.name=torch or megatron.",
        ),
        (
            {"engine": MEGATRON, "train": {"compile": True}, "parallel": {"tensor": 2}},
            "train.compile",
            "Try false, or parallel.tensor=1.",
        ),
        (
            {"engine": DEEPSPEED, "train": {"compile": True}},
            "train.compile",
            "Try false, or engine.name=torch or megatron.",
        ),
    ],
)
def test_what_an_engine_lacks(sections: dict[str, Any], key: str, says: str) -> None:
    assert says in broken(run(**sections), world_size=2)[key]


@pytest.mark.parametrize(
    "sections",
    [
        {"parallel": {}},
        {"engine": {**MEGATRON, "zero_stage": 1}, "parallel": {"tensor": 2, "sequence": True}},
        {"engine": {**MEGATRON, "zero_stage": 1}, "parallel": {"pipeline": 2, "overlap_grad_reduce": True}},
        {"engine": MEGATRON, "train": {"precision": "fp16"}, "launch": {"device": "cpu"}},
        {"engine": MEGATRON, "train": {"compile": True}, "parallel": {"context": 2}},
        {"engine": {**DEEPSPEED, "zero_stage": 3}, "parallel": {"tensor": 2}},
        {"engine": {**DEEPSPEED, "zero_stage": 1, "offload": "cpu"}, "parallel": {"context": 2}},
        {"engine": NVME},
        {"engine": {**DEEPSPEED, "zero_stage": 1}, "parallel": {"overlap_grad_reduce": True}},
        {"engine": {**DEEPSPEED, "zero_stage": 2}, "train": {"precision": "fp16"}},
    ],
)
def test_what_engines_can_do(sections: dict[str, Any]) -> None:
    assert broken(run(**sections), world_size=2) == {}


@pytest.mark.parametrize("name", ["megatron", "deepspeed"])
def test_packages_for_linux_only(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    assert "Linux only, this is darwin. Try torch." in broken(run(engine={"name": name}))["engine.name"]
    assert broken(run()) == {}


def test_every_engine_of_the_schema_has_its_rules() -> None:
    """Each engine refuses something of the most that can be asked for, so none was forgotten."""
    most = {"tensor": 2, "pipeline": 2, "context": 2}
    for name in ENGINES:
        config: RunConfig = run(engine={"name": name, "zero_stage": 3}, parallel=most)
        assert broken(config, world_size=8), name


def test_an_optimizer_needs_an_engine_that_steps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    known = get_args(OptimConfig.model_fields["name"].annotation)
    assert all(set(row.optimizers) <= set(known) for row in ENGINES.values())
    monkeypatch.setitem(ENGINES, "megatron", replace(ENGINES["megatron"], optimizers=("adamw",)))
    refused = broken(run(engine=MEGATRON, optim={"name": "lion"}))["optim.name"]
    assert "engine.name = megatron does not step it. Try adamw, or engine.name=torch or deepspeed." in refused
    assert broken(run(engine=MEGATRON)) == broken(run(optim={"name": "lion"})) == {}


def test_lion_divides_by_nothing() -> None:
    assert "Try 1e-08, or optim.name=adamw." in broken(run(optim={"name": "lion", "eps": 1e-6}))["optim.eps"]
    assert broken(run(optim={"name": "adamw", "eps": 1e-6})) == {}
