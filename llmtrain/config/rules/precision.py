"""Rules about `train.precision`: which device, engine, layout and sizes it goes with. Pure."""

from collections.abc import Iterator
from math import gcd

from llmtrain.config.reading.suggestions import either, nearest_multiples
from llmtrain.config.rules.engine import or_engine, row_of
from llmtrain.config.schema import RunConfig
from llmtrain.errors import Problem

Found = Iterator[Problem]

FLOAT8_MULTIPLE = 16
"""What the sizes of a product in float8 are multiples of: its rows are read in pieces of 16 bytes."""


def fp16_has_a_gpu(config: RunConfig) -> Found:
    stage = config.engine.zero_stage
    if config.train.precision != "fp16" or stage not in row_of(config).gpu_fp16_stages:
        return
    if config.launch.device == "cpu":
        fix = or_engine(lambda other: stage in other.zero_stages and stage not in other.gpu_fp16_stages)
        message = f"engine.name = {config.engine.name} has no fp16 on the CPU. Try train.precision=bf16{fix}."
        uses = ("engine.name", "engine.zero_stage", "train.precision")
        yield Problem("launch.device", message, "cpu", uses=uses)


def fp8_has_a_gpu(config: RunConfig) -> Found:
    if config.train.precision == "fp8" and config.launch.device == "cpu":
        message = "needs a GPU, and launch.device = cpu. Try bf16."
        yield Problem("train.precision", message, "fp8", uses=("launch.device",))


def fp8_has_a_layout(config: RunConfig) -> Found:
    """Layouts whose ranks have torch's linears, and whole micro-batches of activations in them."""
    if config.train.precision != "fp8":
        return
    stage, parallel = config.engine.zero_stage, config.parallel
    if parallel.tensor > 1:
        message = (
            f"needs linears of torch, in whose place parallel.tensor = {parallel.tensor} puts megatron-core's. Try "
            "bf16, or parallel.tensor=1."
        )
        yield Problem("train.precision", message, "fp8", uses=("parallel.tensor",))
    if parallel.context > 1:
        message = (
            f"scales a micro-batch by its largest value, which no rank knows where parallel.context = "
            f"{parallel.context} cuts it. Try bf16, or parallel.context=1."
        )
        yield Problem("train.precision", message, "fp8", uses=("parallel.context",))
    if parallel.pipeline_schedule == "zero_bubble":
        message = (
            "has linears that compute the gradients of input and weight in one, which parallel.pipeline_schedule = "
            "zero_bubble needs apart. Try bf16, or parallel.pipeline_schedule=null."
        )
        yield Problem("train.precision", message, "fp8", uses=("parallel.pipeline_schedule",))
    if stage in row_of(config).no_fp8_stages:
        others = either(sorted({*row_of(config).zero_stages} - {*row_of(config).no_fp8_stages}, reverse=True))
        message = (
            f"would keep the weights that engine.zero_stage = {stage} gathers, until the backward pass. Try bf16, or "
            f"engine.zero_stage {others}."
        )
        yield Problem("train.precision", message, "fp8", uses=("engine.name", "engine.zero_stage"))


def fp8_has_sizes(config: RunConfig) -> Found:
    """Every size of every product: of the weights, and the number of tokens, which gradients of weights sum over."""
    if config.train.precision != "fp8":
        return
    model, micro = config.model, config.train.micro_batch_size
    sizes = {
        "model.hidden_size": model.hidden_size,
        "model.num_heads": model.num_heads * model.head_size,
        "model.num_kv_heads": model.kv_heads * model.head_size,
    }
    if not all(model.has_experts(layer) for layer in range(max(model.encoder_layers, model.decoder_layers))):
        sizes["model.ffn_hidden_size"] = model.ffn_size
    for key, size in sizes.items():
        if size % FLOAT8_MULTIPLE:
            message = f"makes a product of {size}: train.precision = fp8 needs multiples of {FLOAT8_MULTIPLE}"
            head_size = f" (model.head_dim is {model.head_size})" if "heads" in key else ""
            value = getattr(model, key.removeprefix("model."))
            yield Problem(key, f"{message}{head_size}. Try another size, or bf16.", value, uses=("train.precision",))
    lengths = config.lengths
    for length in {lengths.main, lengths.encoder or lengths.main}:
        if micro * length % FLOAT8_MULTIPLE:
            nearby = either(nearest_multiples(FLOAT8_MULTIPLE // gcd(FLOAT8_MULTIPLE, length), micro))
            message = (
                f"times sequences of {length} tokens is {micro * length}: train.precision = fp8 needs a multiple of "
                f"{FLOAT8_MULTIPLE}. Try {nearby}, or train.precision=bf16."
            )
            yield Problem("train.micro_batch_size", message, micro, uses=("train.precision", "data.seq_len"))
            return


PRECISION_RULES = (fp16_has_a_gpu, fp8_has_a_gpu, fp8_has_a_layout, fp8_has_sizes)
