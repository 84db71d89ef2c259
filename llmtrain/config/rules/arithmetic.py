"""The arithmetic between keys, one small function for each rule: all rules, and those about the run as a whole.

A rule yields what is wrong, names every key that it rests on in `uses`, and suggests legal values. The loader adds the
place of each key in its file. Pure: imports no torch and touches no storage.
"""

import re
from collections.abc import Iterator
from difflib import get_close_matches

from llmtrain.config.parameters import FrozenNames, declare_parameters
from llmtrain.config.reading.suggestions import (
    all_keys,
    either,
    nearest,
    nearest_divisors,
    nearest_multiples,
    suggested_keys,
)
from llmtrain.config.rules.augment import AUGMENT_RULES
from llmtrain.config.rules.compression import PRUNE_RULES, QUANTIZE_RULES
from llmtrain.config.rules.distill import DISTILL_RULES
from llmtrain.config.rules.engine import ENGINE_RULES
from llmtrain.config.rules.evaluation import EVALUATION_RULES
from llmtrain.config.rules.finetune import FINETUNE_RULES
from llmtrain.config.rules.launch import LAUNCH_RULES
from llmtrain.config.rules.mixture import MIXTURE_RULES
from llmtrain.config.rules.model import MODEL_RULES
from llmtrain.config.rules.objective import OBJECTIVE_RULES
from llmtrain.config.rules.parallel import PARALLEL_RULES, WORLD_RULES
from llmtrain.config.rules.precision import PRECISION_RULES
from llmtrain.config.schema import OptimConfig, RunConfig
from llmtrain.errors import Problem

Found = Iterator[Problem]


def arithmetic_problems(config: RunConfig, world_size: int) -> list[Problem]:
    """Every rule between keys that a configuration breaks when it runs on `world_size` ranks."""
    problems = [problem for rule in RULES for problem in rule(config)]
    return problems + [problem for rule in (*WORLD_RULES, profiled_ranks_exist) for problem in rule(config, world_size)]


def name_is_a_folder(config: RunConfig) -> Found:
    if config.name.strip(".") == "":
        message = "names the run's folder and cannot be dots alone. Try my-run."
        yield Problem("name", message, config.name)


def one_budget(config: RunConfig) -> Found:
    """Tokens beside epochs are what these come to; whether they are, the data knows."""
    steps, others = config.train.steps, {"tokens": config.train.tokens, "epochs": config.train.epochs}
    given = {name: value for name, value in others.items() if value is not None}
    if steps is None and not given:
        message = "needs train.steps, train.tokens or train.epochs. Try train.steps=1000."
        yield Problem("train", message, uses=("train.steps", "train.tokens", "train.epochs"))
    for name, value in given.items() if steps is not None else ():
        message = (
            f"train.steps = {steps} already says how long to train. Remove one of the two: train.{name}=null, or "
            "train.steps=null."
        )
        yield Problem(f"train.{name}", message, value, uses=("train.steps",))


def epochs_are_of_one_source(config: RunConfig) -> Found:
    epochs, sources = config.train.epochs, len(config.data.train)
    if epochs is not None and sources > 1:
        message = (
            f"data.train has {sources} sources, of which weights and limits decide how often each is read: they have "
            "no epoch together. Set train.steps or train.tokens; `llmtrain train --dry-run` says how many epochs of "
            "each source that is."
        )
        yield Problem("train.epochs", message, epochs, uses=("data.train",))


def heads_divide_hidden_size(config: RunConfig) -> Found:
    model = config.model
    if model.head_dim is None and model.hidden_size % model.num_heads:
        tries = either(nearest_divisors(model.hidden_size, model.num_heads))
        message = f"must divide model.hidden_size = {model.hidden_size}, or set model.head_dim. Try {tries}."
        yield Problem("model.num_heads", message, model.num_heads, uses=("model.hidden_size", "model.head_dim"))


def kv_heads_divide_heads(config: RunConfig) -> Found:
    model = config.model
    if model.num_heads % model.kv_heads:
        tries = either(nearest_divisors(model.num_heads, model.kv_heads))
        message = f"must divide model.num_heads = {model.num_heads}. Try {tries}."
        yield Problem("model.num_kv_heads", message, model.num_kv_heads, uses=("model.num_heads",))


def rope_needs_even_heads(config: RunConfig) -> Found:
    model = config.model
    if model.position != "rope" or model.head_size % 2 == 0:
        return
    if model.head_dim is not None:
        message = f"must be even with model.position = rope. Try {either(nearest_multiples(2, model.head_dim))}."
        yield Problem("model.head_dim", message, model.head_dim, uses=("model.position",))
    elif model.hidden_size % model.num_heads == 0:
        # A half of an even width that leaves whole pairs: heads whose size is even divide hidden_size / 2.
        even = nearest_divisors(model.hidden_size // 2, model.num_heads) if model.hidden_size % 2 == 0 else []
        tries = f"Try {either(even)}, or model.position=learned." if even else "Try model.position=learned."
        message = (
            f"gives heads of size {model.head_size} (model.hidden_size = {model.hidden_size}), which must be even "
            f"with model.position = rope. {tries}"
        )
        uses = ("model.hidden_size", "model.head_dim", "model.position")
        yield Problem("model.num_heads", message, model.num_heads, uses=uses)


def rope_scaling_needs_rope(config: RunConfig) -> Found:
    model = config.model
    if model.rope_scaling is None:
        return
    if model.position != "rope":
        message = f"has no effect with model.position = {model.position}. Try null, or model.position=rope."
        yield Problem("model.rope_scaling", message, uses=("model.position",))


def loss_scale_has_room(config: RunConfig) -> Found:
    scale = config.optim.loss_scale
    if scale.initial < scale.minimum:
        message = f"must be at least optim.loss_scale.minimum = {scale.minimum:g}. Try 65536."
        yield Problem("optim.loss_scale.initial", message, scale.initial, uses=("optim.loss_scale.minimum",))


def allowed_changes_are_keys(config: RunConfig) -> Found:
    for number, name in enumerate(config.checkpoint.allow_change):
        general = re.sub(r"\.\d+(?=\.|$)", ".0", name)
        if not any(key == general or key.startswith(f"{general}.") for key in all_keys()):
            guesses = suggested_keys(name.split(".")) or nearest(name, all_keys())
            advice = f"Did you mean {either(guesses)}?" if guesses else "Write keys or sections, such as [seed]."
            yield Problem(f"checkpoint.allow_change.{number}", f"is not a key. {advice}", name)


def norms_have_rows(config: RunConfig) -> Found:
    """Norms of layers are columns of rows: a step that has no row would compute them in vain."""
    norms, rows = config.observe.layer_norms_every_steps, config.observe.log_every_steps
    if norms % rows:
        message = (
            f"must be a multiple of observe.log_every_steps = {rows}, whose rows carry them. "
            f"Try {either(nearest_multiples(rows, norms))}."
        )
        yield Problem("observe.layer_norms_every_steps", message, norms, uses=("observe.log_every_steps",))


def profile_is_inside_the_run(config: RunConfig) -> Found:
    profile = config.observe.profile
    if profile is None:
        return
    first, last = profile.steps
    if first > last:
        message = f"the first step comes after the last. Try [{last}, {first}]."
        yield Problem("observe.profile.steps", message, [first, last])
        return
    if (config.train.steps is None) == (config.train.tokens is None):
        return  # of epochs the data has to be asked first
    end = config.total_steps
    if last > end:
        uses = ("train.steps", "train.tokens", "train.global_batch_size", "data.seq_len")
        message = f"the run ends with step {end}. Try [{max(1, end - last + first)}, {end}]."
        yield Problem("observe.profile.steps", message, [first, last], uses=uses)


def artifacts_have_a_place(config: RunConfig) -> Found:
    observe = config.observe
    if observe.wandb_artifacts == "none":
        return
    if observe.wandb == "off":
        message = "has no effect with observe.wandb = off. Try none, or observe.wandb=offline."
        yield Problem("observe.wandb_artifacts", message, observe.wandb_artifacts, uses=("observe.wandb",))
        return


def profiled_ranks_exist(config: RunConfig, world_size: int) -> Found:
    profile = config.observe.profile
    absent = [rank for rank in profile.ranks if rank >= world_size] if profile else []
    if absent:
        ranks = "is rank 0 only" if world_size == 1 else f"are ranks 0 to {world_size - 1}"
        message = f"there {ranks} (launch.num_workers = {world_size}). Try [0]."
        yield Problem("observe.profile.ranks", message, absent, uses=("launch.num_workers",))


def decay_follows_warmup(config: RunConfig) -> Found:
    """`optim.decay_steps` is the step at which the decay ends. With wsd it is a length, and fits anywhere."""
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
    names = list(declare_parameters(config.model.with_any_sizes(), config.finetune))
    for number, pattern in enumerate(patterns):
        if not any(name in FrozenNames((pattern,)) for name in names):
            tries = get_close_matches(pattern, names, 1, 0.3) or names[:1]
            message = f"fits no parameter of the model. Try {tries[0]}, or a pattern with * such as embeddings.*."
            yield Problem(f"optim.freeze.{number}", message, pattern, uses=("model",))
    if all(name in config.frozen for name in names):
        message = "fits every parameter, so nothing is left to train. Try fewer patterns."
        yield Problem("optim.freeze", message, ", ".join(patterns), uses=("model",))


def rates_are_of_parameters(config: RunConfig) -> Found:
    """Every pattern fits something that is trained. The vocabulary's size does not matter here."""
    if not config.optim.lr_scale:
        return
    declared = declare_parameters(config.model.with_any_sizes(), config.finetune)
    names = [name for name in declared if name not in config.frozen]
    for number, entry in enumerate(config.optim.lr_scale):
        for place, pattern in enumerate(entry.names):
            if not any(name in FrozenNames((pattern,)) for name in names):
                tries = get_close_matches(pattern, names, 1, 0.3) or names[:1]
                message = f"fits no parameter that is trained. Try {tries[0]}, or a pattern with * such as *norm*."
                yield Problem(f"optim.lr_scale.{number}.names.{place}", message, pattern, uses=("model", "finetune"))


def schedule_warnings(config: RunConfig) -> list[str]:
    """The parts of its schedule that a run which keeps the rules is too short for.

    A short run of a long one's configuration is its beginning, step by step: it is warned of, not refused.
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


RULES = (
    name_is_a_folder,
    one_budget,
    epochs_are_of_one_source,
    heads_divide_hidden_size,
    kv_heads_divide_heads,
    rope_needs_even_heads,
    rope_scaling_needs_rope,
    *OBJECTIVE_RULES,
    *AUGMENT_RULES,
    decay_follows_warmup,
    lr_falls,
    eps_is_used,
    freeze_names_parameters,
    rates_are_of_parameters,
    *FINETUNE_RULES,
    *DISTILL_RULES,
    *PRUNE_RULES,
    *QUANTIZE_RULES,
    loss_scale_has_room,
    *MIXTURE_RULES,
    *EVALUATION_RULES,
    allowed_changes_are_keys,
    *MODEL_RULES,
    *ENGINE_RULES,
    *PRECISION_RULES,
    *PARALLEL_RULES,
    *LAUNCH_RULES,
    norms_have_rows,
    profile_is_inside_the_run,
    artifacts_have_a_place,
)
