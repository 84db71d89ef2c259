"""Rules about `prune`: what is pruned is there and trained, and the keys of a kind have an effect. Pure."""

from collections.abc import Iterator
from difflib import get_close_matches

from llmtrain.config.finetune import PruneConfig
from llmtrain.config.parameters import is_target, iter_linears, pruned_linears, target_names
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
    """The vocabulary's size does not matter here."""
    if config.prune is None:
        return
    linears = [linear for linear, _ in iter_linears(config.model.with_any_sizes())]
    short = list(dict.fromkeys(name for linear in linears for name in target_names(linear)))
    for number, target in enumerate(config.prune.targets):
        if not any(is_target(linear, target) for linear in linears):
            tries = get_close_matches(target, [*short, *linears], 1, 0.4) or short[:1]
            message = f"fits no linear of the model's layers. Try {tries[0]}; the short names are {', '.join(short)}."
            yield Problem(f"prune.targets.{number}", message, target, uses=("model",))


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
