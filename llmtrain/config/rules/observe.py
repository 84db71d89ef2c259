"""Rules between observe.* and the rest of a run. Pure."""

from collections.abc import Iterator

from llmtrain.config.reading.key_names import either
from llmtrain.config.reading.legal_values import nearest_multiples
from llmtrain.config.schema import RunConfig
from llmtrain.errors import Problem

Found = Iterator[Problem]


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
        return
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


OBSERVE_RULES = (norms_have_rows, profile_is_inside_the_run, artifacts_have_a_place)
OBSERVE_WORLD_RULES = (profiled_ranks_exist,)
