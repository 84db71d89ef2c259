"""Rules about `finetune`: what is added fits the model, the precision and the data. Pure."""

from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches

from llmtrain.config.finetune import AdapterConfig, LoraConfig, PromptConfig
from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import FrozenNames, is_target, iter_linears, parameter_shapes, target_names
from llmtrain.config.schema import RunConfig
from llmtrain.errors import Problem

Found = Iterator[Problem]

EXPERT_RANK_MULTIPLE = 8
"""In bf16 the one kernel for all experts reads rows in pieces of 16 bytes."""


def other_methods_are_not_set(config: RunConfig) -> Found:
    if config.finetune is None:
        return
    for name, section in (("lora", LoraConfig), ("adapter", AdapterConfig), ("prompt", PromptConfig)):
        if name != config.method and getattr(config.finetune, name) != section():
            message = (
                f"has no effect with finetune.method = {config.method}. Set finetune.method={name}, or leave it out."
            )
            yield Problem(f"finetune.{name}", message, uses=("finetune.method",))


def misnamed_linears(
    key: str, patterns: Sequence[str], model: ModelConfig, fits: Callable[[str, str], bool], hint: str = ""
) -> Found:
    """A problem for each of a key's patterns that fits no linear, with the nearest name, and what else helps.

    `fits` takes a linear and a pattern. The sizes that only data tell do not matter here.
    """
    linears = [linear for linear, _ in iter_linears(model.with_any_sizes())]
    short = list(dict.fromkeys(name for linear in linears for name in target_names(linear)))
    for number, pattern in enumerate(patterns):
        if not any(fits(linear, pattern) for linear in linears):
            (nearest, *_) = get_close_matches(pattern, [*short, *linears], 1, 0.4) or short
            message = f"fits no linear of the model's layers. Try {nearest}; the short names are {', '.join(short)}."
            yield Problem(f"{key}.{number}", f"{message} {hint}".rstrip(), pattern, uses=("model",))


def targets_are_linears(config: RunConfig) -> Found:
    """Every target means a linear of the model, and what is trained beside them is there."""
    if config.finetune is None or config.method != "lora":
        return
    lora, model = config.finetune.lora, config.model.with_any_sizes()
    yield from misnamed_linears("finetune.lora.targets", lora.targets, model, is_target)
    names = list(parameter_shapes(model))
    for number, pattern in enumerate(lora.train_also):
        if not any(name in FrozenNames((pattern,)) for name in names):
            tries = get_close_matches(pattern, names, 1, 0.3) or names[:1]
            message = f"fits no parameter of the model. Try {tries[0]}, or a pattern with * such as *norm*."
            yield Problem(f"finetune.lora.train_also.{number}", message, pattern, uses=("model",))


def updates_of_experts_fit(config: RunConfig) -> Found:
    """Experts multiply rows of many tokens at once, which are not where dropout would look for them."""
    if config.finetune is None or config.method != "lora" or config.model.moe is None:
        return
    lora = config.finetune.lora
    model = config.model.with_any_sizes()
    targeted = any(
        weight.expert and any(is_target(linear, target) for target in lora.targets)
        for linear, weight in iter_linears(model)
    )
    if targeted and lora.dropout > 0:
        message = "is for linears of single tokens, and finetune.lora.targets has experts. Set 0, or leave experts out."
        yield Problem("finetune.lora.dropout", message, lora.dropout, uses=("finetune.lora.targets", "model.moe"))
    if targeted and config.train.precision != "fp32" and lora.rank % EXPERT_RANK_MULTIPLE:
        message = f"must be a multiple of {EXPERT_RANK_MULTIPLE} for experts in {config.train.precision}. Try "
        message += f"{-(-lora.rank // EXPERT_RANK_MULTIPLE) * EXPERT_RANK_MULTIPLE}."
        uses = ("finetune.lora.targets", "model.moe", "train.precision")
        yield Problem("finetune.lora.rank", message, lora.rank, uses=uses)


def additions_have_a_precision(config: RunConfig) -> Found:
    if config.method != "full" and config.train.precision == "fp8":
        message = f"multiplies all of a layer's linears in float8, and those of finetune.method = {config.method} are "
        yield Problem("train.precision", f"{message}too small for it. Try bf16.", "fp8", uses=("finetune.method",))


def prompts_have_a_text(config: RunConfig) -> Found:
    if config.finetune is None or config.method != "prompt":
        return
    prompt, key = config.finetune.prompt, "finetune.prompt.text"
    if prompt.init == "text" and not prompt.text:
        yield Problem(
            key, "is missing, and finetune.prompt.init = text begins with it.", uses=("finetune.prompt.init",)
        )
    if prompt.init == "vocabulary" and prompt.text:
        message = "has no effect with finetune.prompt.init = vocabulary. Set that to text, or leave this out."
        yield Problem(key, message, prompt.text, uses=("finetune.prompt.init",))
    if (config.data.parts_attention or config.data.reset_positions) and config.data.packing_kind != "single":
        message = "stands before a sample, and the documents in it do not see each other. Set data.packing=single."
        uses = ("data.reset_attention", "data.reset_positions", "data.packing", "data.objective")
        yield Problem("finetune.method", message, "prompt", uses=uses)


FINETUNE_RULES = (
    other_methods_are_not_set,
    targets_are_linears,
    updates_of_experts_fit,
    additions_have_a_precision,
    prompts_have_a_text,
)
