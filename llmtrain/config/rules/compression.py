"""Rules about `prune` and `quantize`: what they mean is there and trained, their keys have an effect, and layouts can
do it. Pure."""

from collections.abc import Iterator

from llmtrain.config.finetune import PruneConfig
from llmtrain.config.parameters import (
    is_kept,
    is_target,
    iter_linears,
    pruned_linears,
    quantized_linears,
)
from llmtrain.config.reading.suggestions import either
from llmtrain.config.rules.finetune import misnamed_linears
from llmtrain.config.schema import RunConfig
from llmtrain.errors import Problem

Found = Iterator[Problem]

KEYS = {"magnitude": ("sparsity", "from_step", "until_step", "every_steps"), "2:4": ("from_step",), "kept": ()}
"""The keys that each kind uses beside its targets."""

GROUP = 4
"""2:4: neighbours that are pruned together."""


def keys_have_an_effect(config: RunConfig) -> Found:
    if config.prune is None:
        return
    prune, default = config.prune, PruneConfig()
    for key in KEYS["magnitude"]:
        if key not in KEYS[prune.kind] and getattr(prune, key) != getattr(default, key):
            kinds = " or ".join(kind for kind, keys in KEYS.items() if key in keys)
            message = f"has no effect with prune.kind = {prune.kind}. Remove it, or set prune.kind={kinds}."
            yield Problem(f"prune.{key}", message, getattr(prune, key), uses=("prune.kind",))
    if prune.until_step is None and prune.every_steps != default.every_steps and prune.kind == "magnitude":
        message = "has no effect without prune.until_step: all is pruned behind prune.from_step. Set prune.until_step."
        yield Problem("prune.every_steps", message, prune.every_steps, uses=("prune.until_step", "prune.kind"))
    if prune.until_step is not None and prune.until_step <= prune.from_step:
        message = f"must be more than prune.from_step = {prune.from_step}. Try null, which prunes all at once."
        yield Problem("prune.until_step", message, prune.until_step, uses=("prune.from_step",))


def targets_are_linears(config: RunConfig) -> Found:
    if config.prune is not None:
        yield from misnamed_linears("prune.targets", config.prune.targets, config.model, is_target)


def targets_are_trained(config: RunConfig) -> Found:
    """What is frozen stays as it is; what is added to a model would hide the zeros of the model."""
    if config.prune is None:
        return
    if config.method != "full":
        message = "trains what it adds, and prune changes the model itself. Set finetune.method=full, or remove prune."
        yield Problem("finetune.method", message, config.method, uses=("prune",))
        return
    model = config.model.with_any_sizes()
    frozen = [weight.name for _, weight in pruned_linears(model, config.prune.targets) if weight.name in config.frozen]
    if frozen:
        message = f"has {frozen[0]}, which optim.freeze keeps as it is. Leave it out here or there."
        yield Problem("prune.targets", message, ", ".join(config.prune.targets), uses=("optim.freeze",))


def groups_are_whole(config: RunConfig) -> Found:
    """Four neighbours along the input lie on one tensor rank."""
    if config.prune is None or config.prune.kind != "2:4":
        return
    for linear, weight in pruned_linears(config.model.with_any_sizes(), config.prune.targets):
        width = weight.shape[-1]
        ranks = config.parallel.tensor if weight.split == len(weight.shape) - 1 else 1
        if width % ranks == 0 and width // ranks % GROUP:
            split = f" on each of {ranks} tensor ranks" if ranks > 1 else ""
            message = (
                f"takes groups of {GROUP} inputs, and {linear} has {width // ranks} of them{split}. Leave it out of "
            )
            yield Problem("prune.kind", f"{message}prune.targets, or try magnitude.", "2:4", uses=("model", "parallel"))
            return


PRUNE_RULES = (keys_have_an_effect, targets_are_linears, targets_are_trained, groups_are_whole)


def kept_linears_are_there(config: RunConfig) -> Found:
    if config.quantize is None:
        return
    hint = "The head, embeddings, norms and routers are never rounded."
    yield from misnamed_linears("quantize.keep", config.quantize.keep, config.model, is_kept, hint)
    linears = [linear for linear, _ in iter_linears(config.model.with_any_sizes())]
    if all(any(is_kept(linear, pattern) for pattern in config.quantize.keep) for linear in linears):
        message = "leaves nothing to round. Leave some linears out of it, or remove quantize."
        yield Problem("quantize.keep", message, ", ".join(config.quantize.keep), uses=("model",))


def groups_have_a_scale(config: RunConfig) -> Found:
    """Groups divide the inputs of every matrix, and those that each tensor rank has of it."""
    if config.quantize is None:
        return
    group = config.quantize.numbers.group
    if config.quantize.numbers.rounds_inputs and config.quantize.group:
        message = f"goes with w8a16 and w4a16. With {config.quantize.scheme} each output has one scale. Try 0."
        yield Problem("quantize.group", message, config.quantize.group, uses=("quantize.scheme",))
        return
    if group is None:
        return
    linears = list(quantized_linears(config.model.with_any_sizes(), config.quantize.keep))
    ranks = {
        linear: config.parallel.tensor if weight.split == len(weight.shape) - 1 else 1 for linear, weight in linears
    }
    inputs = {linear: weight.shape[-1] // ranks[linear] for linear, weight in linears}
    for linear, size in inputs.items():
        if size % group:
            fitting = [str(number) for number in (128, 64, 32, 16, 8) if not any(i % number for i in inputs.values())]
            split = f" on each of {ranks[linear]} tensor ranks" if ranks[linear] > 1 else ""
            message = f"does not divide the {size} inputs that {linear} has{split}. Try {either([*fitting, '0'])}, "
            message += "where 0 is one scale of each output, or name it in quantize.keep."
            yield Problem("quantize.group", message, group, uses=("quantize.scheme", "model", "parallel.tensor"))
            return


def rounded_products_are_ours(config: RunConfig) -> Found:
    """What is rounded in a product is not multiplied by others, and not all of the product is left for later."""
    if config.quantize is None:
        return
    if config.train.precision == "fp8":
        message = "multiplies all of a layer's linears in float8, and quantize rounds them to whole numbers. Try bf16."
        yield Problem("train.precision", message, "fp8", uses=("quantize",))
    if config.parallel.pipeline_schedule == "zero_bubble":
        message = "leaves products for later, which quantize rounds at once. Try null, or remove quantize."
        yield Problem("parallel.pipeline_schedule", message, "zero_bubble", uses=("quantize",))


def inputs_are_rounded_for_what_is_trained(config: RunConfig) -> Found:
    if config.quantize is not None and config.method != "full" and config.quantize.numbers.rounds_inputs:
        message = f"rounds what goes into weights that finetune.method = {config.method} does not train, and not what "
        message += "goes into what it adds. Try w8a16."
        yield Problem("quantize.scheme", message, config.quantize.scheme, uses=("finetune.method",))


QUANTIZE_RULES = (
    kept_linears_are_there,
    groups_have_a_scale,
    rounded_products_are_ours,
    inputs_are_rounded_for_what_is_trained,
)
