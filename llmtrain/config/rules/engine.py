"""What each engine can do: rules between engine.* and the rest. Pure."""

import sys
from collections.abc import Iterator

from llmtrain.config.schema import RunConfig
from llmtrain.errors import Problem

Found = Iterator[Problem]


def engine_is_on_this_platform(config: RunConfig) -> Found:
    name = config.engine.name
    if name != "torch" and sys.platform != "linux":
        message = f"its package is made for Linux only, this is {sys.platform}. Try torch."
        yield Problem("engine.name", message, name)


def torch_splits_the_batch_only(config: RunConfig) -> Found:
    if config.engine.name != "torch":
        return
    both = "megatron or deepspeed"
    others = {"tensor": both, "context": both, "expert": both, "pipeline": "megatron"}
    for axis, engines in others.items():
        size = getattr(config.parallel, axis)
        if size > 1:
            message = f"engine.name = torch splits the batch only. Try 1, or engine.name={engines}."
            yield Problem(f"parallel.{axis}", message, size, uses=("engine.name",))
    if config.parallel.overlap_grad_reduce:
        message = "engine.name = torch reduces gradients after the backward pass. Try false, or engine.name=megatron."
        yield Problem("parallel.overlap_grad_reduce", message, "true", uses=("engine.name",))


def engine_has_zero_stage(config: RunConfig) -> Found:
    name, stage, pipeline = config.engine.name, config.engine.zero_stage, config.parallel.pipeline
    uses: tuple[str, ...] = ("engine.name",)
    if name == "torch" and stage > 0:
        fitting = "megatron or deepspeed" if stage == 1 else "deepspeed"
        message = (
            f"engine.name = torch shards no optimizer state, gradients or weights. Try 0, or engine.name={fitting}."
        )
    elif name == "megatron" and stage > 1 and pipeline > 1:
        message = (
            f"ZeRO 2 and 3 do not go with a pipeline (parallel.pipeline = {pipeline}): they would reduce gradients, or "
            "gather weights, once per micro-batch. Try 1, or engine.name=deepspeed with parallel.pipeline=1."
        )
        uses = ("engine.name", "parallel.pipeline")
    elif name == "megatron" and stage > 1:
        message = "engine.name = megatron shards optimizer state only. Try 1, or engine.name=deepspeed."
    else:
        return
    yield Problem("engine.zero_stage", message, stage, uses=uses)


def deepspeed_has_no_pipeline(config: RunConfig) -> Found:
    stage, pipeline = config.engine.zero_stage, config.parallel.pipeline
    if config.engine.name != "deepspeed" or pipeline == 1:
        return
    with_stage = " with engine.zero_stage=1: ZeRO 2 and 3 do not go with a pipeline" if stage > 1 else ""
    message = f"engine.name = deepspeed has no pipeline. Try 1, or engine.name=megatron{with_stage}."
    uses = ("engine.name", "engine.zero_stage") if stage > 1 else ("engine.name",)
    yield Problem("parallel.pipeline", message, pipeline, uses=uses)


def experts_stay_whole_in_stage_3(config: RunConfig) -> Found:
    stage, expert = config.engine.zero_stage, config.parallel.expert
    if config.engine.name == "deepspeed" and stage == 3 and expert > 1:
        message = (
            f"DeepSpeed does not partition weights of experts that are spread over ranks (parallel.expert = {expert}). "
            "Try 2 or 1, or parallel.expert=1."
        )
        yield Problem("engine.zero_stage", message, stage, uses=("engine.name", "parallel.expert"))


def offload_has_a_place(config: RunConfig) -> Found:
    engine = config.engine
    if engine.nvme_path is not None and engine.offload != "nvme":
        message = f"has no effect with engine.offload = {engine.offload}. Try null, or engine.offload=nvme."
        yield Problem("engine.nvme_path", message, engine.nvme_path, uses=("engine.offload",))
    if engine.offload == "none":
        return
    if engine.name != "deepspeed":
        message = f"engine.name = {engine.name} does not offload. Try none, or engine.name=deepspeed."
        yield Problem("engine.offload", message, engine.offload, uses=("engine.name",))
        return
    uses = ("engine.name", "engine.zero_stage")
    if engine.offload == "cpu" and engine.zero_stage == 0:
        message = "needs optimizer state that is sharded: engine.zero_stage 1, 2 or 3. Try engine.zero_stage=2."
        yield Problem("engine.offload", message, engine.offload, uses=uses)
    if engine.offload == "nvme" and engine.zero_stage != 3:
        message = f"needs engine.zero_stage 3, not {engine.zero_stage}. Try engine.zero_stage=3, or cpu."
        yield Problem("engine.offload", message, engine.offload, uses=uses)
    if engine.offload == "nvme" and engine.nvme_path is None:
        message = "needs a folder on the local disk. Try engine.nvme_path=/tmp/llmtrain."
        yield Problem("engine.offload", message, engine.offload, uses=("engine.nvme_path",))


def deepspeed_has_fp16_on_gpus_only(config: RunConfig) -> Found:
    # Without ZeRO its fp16 mode is not in use.
    if config.engine.name != "deepspeed" or config.engine.zero_stage == 0 or config.train.precision != "fp16":
        return
    if config.launch.device == "cpu":
        message = "DeepSpeed has no fp16 on the CPU. Try train.precision=bf16, or engine.name=megatron."
        uses = ("engine.name", "engine.zero_stage", "train.precision")
        yield Problem("launch.device", message, "cpu", uses=uses)


def compile_needs_torch_linears(config: RunConfig) -> Found:
    if config.train.compile and config.engine.name != "torch" and config.parallel.tensor > 1:
        message = (
            f"needs linears of torch, in whose place parallel.tensor = {config.parallel.tensor} puts megatron-core's. "
            "Try false, or parallel.tensor=1."
        )
        yield Problem("train.compile", message, "true", uses=("parallel.tensor", "engine.name"))


def deepspeed_does_not_compile(config: RunConfig) -> Found:
    if config.train.compile and config.engine.name == "deepspeed" and config.parallel.tensor == 1:
        message = "ZeRO's hooks inside of layers are not compiled. Try false, or engine.name=torch or megatron."
        yield Problem("train.compile", message, "true", uses=("engine.name",))


ENGINE_RULES = (
    engine_is_on_this_platform,
    torch_splits_the_batch_only,
    engine_has_zero_stage,
    deepspeed_has_no_pipeline,
    experts_stay_whole_in_stage_3,
    offload_has_a_place,
    deepspeed_has_fp16_on_gpus_only,
    compile_needs_torch_linears,
    deepspeed_does_not_compile,
)
