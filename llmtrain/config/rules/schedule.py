"""Rules about optimizer and learning-rate schedule, and what is told of one that is longer than its run. Pure."""

from collections.abc import Iterator
from difflib import get_close_matches

from llmtrain.config.parameters import declare_parameters, is_frozen
from llmtrain.config.schema import OptimConfig, RunConfig
from llmtrain.errors import Problem

Found = Iterator[Problem]


def decay_follows_warmup(config: RunConfig) -> Found:
    """Where `optim.decay_steps` is the step at which the decay ends. With wsd it is a length, and fits anywhere."""
    optim = config.optim
    if optim.decay_steps is not None and optim.schedule != "wsd" and optim.decay_steps <= optim.warmup_steps:
        message = f"must be greater than optim.warmup_steps = {optim.warmup_steps}. Try {2 * optim.warmup_steps}."
        uses = ("optim.warmup_steps", "optim.schedule")
        yield Problem("optim.decay_steps", message, optim.decay_steps, uses=uses)


def lr_falls(config: RunConfig) -> Found:
    optim = config.optim
    if optim.schedule != "constant" and optim.min_lr > optim.lr:
        message = f"must be at most optim.lr = {optim.lr:g}. Try {optim.lr / 10:g}."
        yield Problem("optim.min_lr", message, optim.min_lr, uses=("optim.lr", "optim.schedule"))


def eps_is_used(config: RunConfig) -> Found:
    optim, usual = config.optim, OptimConfig.model_fields["eps"].default
    if optim.name == "lion" and optim.eps != usual:
        message = f"has no effect with optim.name = lion, which divides by nothing. Try {usual:g}, or optim.name=adamw."
        yield Problem("optim.eps", message, optim.eps, uses=("optim.name",))


def freeze_names_parameters(config: RunConfig) -> Found:
    """Every pattern fits a parameter, and something is left to train. The vocabulary's size does not matter here."""
    patterns = config.optim.freeze
    if not patterns:
        return
    names = list(declare_parameters(config.model.with_keys({"vocab_size": config.model.vocab_size or 1})))
    for number, pattern in enumerate(patterns):
        if not any(is_frozen(name, [pattern]) for name in names):
            tries = get_close_matches(pattern, names, 1, 0.3) or names[:1]
            message = f"fits no parameter of the model. Try {tries[0]}, or a pattern with * such as embeddings.*."
            yield Problem(f"optim.freeze.{number}", message, pattern, uses=("model",))
    if all(is_frozen(name, patterns) for name in names):
        message = "fits every parameter, so nothing is left to train. Try fewer patterns."
        yield Problem("optim.freeze", message, ", ".join(patterns), uses=("model",))


SCHEDULE_RULES = (decay_follows_warmup, lr_falls, eps_is_used, freeze_names_parameters)


def schedule_warnings(config: RunConfig) -> list[str]:
    """What of its schedule a run does not come to, which keeps the rules.

    A short run of a long one's configuration is its beginning, step by step: it is told, not refused.
    """
    optim, steps = config.optim, config.total_steps
    if steps <= optim.warmup_steps:
        reached = optim.lr * steps / optim.warmup_steps
        warning = (
            f"optim.warmup_steps = {optim.warmup_steps:,} takes all of the run's {steps:,} steps: the learning rate "
            f"rises to {reached:g}, of optim.lr = {optim.lr:g}, and never falls. "
            f"For a whole schedule set optim.warmup_steps={steps // 10}."
        )
        return [warning]
    room = steps - optim.warmup_steps
    if optim.schedule == "wsd" and optim.decay_steps is not None and optim.decay_steps > room:
        warning = (
            f"optim.decay_steps = {optim.decay_steps:,} is longer than what warm-up leaves of the run's {steps:,} "
            f"steps: the decay takes {room:,}. Set optim.decay_steps={max(1, room)} or less to say so."
        )
        return [warning]
    return []
