"""Rules between engine.* and the rest; what an engine can do stands in config/engines.py. Pure."""

import sys
from collections.abc import Callable, Iterator

from llmtrain.config.engines import ENGINES, EngineRow, engines_that
from llmtrain.config.reading.suggestions import either
from llmtrain.config.schema import RunConfig
from llmtrain.errors import Problem

Found = Iterator[Problem]

SHARDED = ("no optimizer state, gradients or weights", "optimizer state only", "no weights")
"""In words, what the highest ZeRO stage of an engine shards."""


def row_of(config: RunConfig) -> EngineRow:
    return ENGINES[config.engine.name]


def or_engine(can: Callable[[EngineRow], bool]) -> str:
    """`, or engine.name=a or b`: the engines that can do something; empty where none can."""
    names = engines_that(can)
    return f", or engine.name={either(names)}" if names else ""


def engine_is_on_this_platform(config: RunConfig) -> Found:
    platforms = row_of(config).platforms
    if platforms and sys.platform not in platforms:
        others = either(engines_that(lambda row: not row.platforms or sys.platform in row.platforms))
        made_for = either(platform.capitalize() for platform in platforms)
        message = f"its package is made for {made_for} only, this is {sys.platform}. Try {others}."
        yield Problem("engine.name", message, config.engine.name)


def engine_has_axes(config: RunConfig) -> Found:
    row, stage = row_of(config), config.engine.zero_stage
    for axis in ("tensor", "context", "expert", "pipeline"):
        size = getattr(config.parallel, axis)
        if size == 1 or axis in row.axes:
            continue
        lacks = f"has no {axis}{' parallelism' if axis != 'pipeline' else ''}" if row.axes else "splits the batch only"
        fix = or_engine(lambda other, axis=axis: axis in other.axes)
        uses: tuple[str, ...] = ("engine.name",)
        if axis == "pipeline" and stage > 1 and stage in row.zero_stages:
            fix += " with engine.zero_stage=1: ZeRO 2 and 3 do not go with a pipeline"
            uses = ("engine.name", "engine.zero_stage")
        message = f"engine.name = {config.engine.name} {lacks}. Try 1{fix}."
        yield Problem(f"parallel.{axis}", message, size, uses=uses)


def engine_has_zero_stage(config: RunConfig) -> Found:
    row, stage, pipeline = row_of(config), config.engine.zero_stage, config.parallel.pipeline
    if stage in row.zero_stages:
        return
    most = max(row.zero_stages)
    fix = or_engine(lambda other: stage in other.zero_stages)
    uses: tuple[str, ...] = ("engine.name",)
    if pipeline > 1 and "pipeline" in row.axes:
        message = (
            f"ZeRO 2 and 3 do not go with a pipeline (parallel.pipeline = {pipeline}): they would reduce gradients, or "
            f"gather weights, once per micro-batch. Try {most}{fix} with parallel.pipeline=1."
        )
        uses = ("engine.name", "parallel.pipeline")
    else:
        message = f"engine.name = {config.engine.name} shards {SHARDED[most]}. Try {most}{fix}."
    yield Problem("engine.zero_stage", message, stage, uses=uses)


def experts_stay_whole(config: RunConfig) -> Found:
    row, stage, expert = row_of(config), config.engine.zero_stage, config.parallel.expert
    if stage in row.whole_expert_stages and expert > 1:
        others = either(sorted({*row.zero_stages} - {0, *row.whole_expert_stages}, reverse=True))
        message = (
            f"engine.name = {config.engine.name} does not partition weights of experts that are spread over ranks "
            f"(parallel.expert = {expert}). Try {others}, or parallel.expert=1."
        )
        yield Problem("engine.zero_stage", message, stage, uses=("engine.name", "parallel.expert"))


def offload_has_a_place(config: RunConfig) -> Found:
    engine, offloads = config.engine, row_of(config).offloads
    if engine.nvme_path is not None and engine.offload != "nvme":
        message = f"has no effect with engine.offload = {engine.offload}. Try null, or engine.offload=nvme."
        yield Problem("engine.nvme_path", message, engine.nvme_path, uses=("engine.offload",))
    if engine.offload == "none":
        return
    if engine.offload not in offloads:
        fix = or_engine(lambda other: engine.offload in other.offloads)
        message = f"engine.name = {engine.name} does not offload{' so' if offloads else ''}. Try none{fix}."
        yield Problem("engine.offload", message, engine.offload, uses=("engine.name",))
        return
    stages = offloads[engine.offload]
    if engine.zero_stage not in stages:
        others = [other for other, fitting in offloads.items() if engine.zero_stage in fitting]
        message = (
            f"needs engine.zero_stage {either(stages)}, not {engine.zero_stage}. "
            f"Try engine.zero_stage={stages[len(stages) // 2]}{f', or {either(others)}' if others else ''}."
        )
        yield Problem("engine.offload", message, engine.offload, uses=("engine.name", "engine.zero_stage"))
    if engine.offload == "nvme" and engine.nvme_path is None:
        message = "needs a folder on the local disk. Try engine.nvme_path=/tmp/llmtrain."
        yield Problem("engine.offload", message, engine.offload, uses=("engine.nvme_path",))


def overlap_has_a_stage(config: RunConfig) -> Found:
    row, stage = row_of(config), config.engine.zero_stage
    if config.parallel.overlap_grad_reduce and stage in row.no_overlap_stages:
        others = either(sorted({*row.zero_stages} - {*row.no_overlap_stages}))
        fix = or_engine(lambda other: stage in other.zero_stages and stage not in other.no_overlap_stages)
        message = (
            f"engine.name = {config.engine.name} sums gradients after the backward pass where engine.zero_stage = "
            f"{stage}. Try false, engine.zero_stage {others}{fix}."
        )
        yield Problem("parallel.overlap_grad_reduce", message, "true", uses=("engine.name", "engine.zero_stage"))


def compile_needs_torch_linears(config: RunConfig) -> Found:
    if config.train.compile and "tensor" in row_of(config).axes and config.parallel.tensor > 1:
        message = (
            f"needs linears of torch, in whose place parallel.tensor = {config.parallel.tensor} puts megatron-core's. "
            "Try false, or parallel.tensor=1."
        )
        yield Problem("train.compile", message, "true", uses=("parallel.tensor", "engine.name"))


def engine_compiles(config: RunConfig) -> Found:
    why = row_of(config).no_compile
    if config.train.compile and why and config.parallel.tensor == 1:
        message = f"{why}. Try false{or_engine(lambda other: not other.no_compile)}."
        yield Problem("train.compile", message, "true", uses=("engine.name",))


def engine_takes_optimizer(config: RunConfig) -> Found:
    name = config.optim.name
    if name not in row_of(config).optimizers:
        others = or_engine(lambda row: name in row.optimizers)
        message = f"engine.name = {config.engine.name} does not step it. Try {row_of(config).optimizers[0]}{others}."
        yield Problem("optim.name", message, name, uses=("engine.name",))


ENGINE_RULES = (
    engine_takes_optimizer,
    engine_is_on_this_platform,
    engine_has_axes,
    engine_has_zero_stage,
    experts_stay_whole,
    offload_has_a_place,
    overlap_has_a_stage,
    compile_needs_torch_linears,
    engine_compiles,
)
