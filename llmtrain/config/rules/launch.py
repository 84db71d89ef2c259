"""Rules about how ranks are started. Pure, like all rules."""

import re
from collections.abc import Iterator

from llmtrain.config.reading.credentials import VARIABLE_PATTERN, is_fixed_variable, is_secret_variable
from llmtrain.config.reading.suggestions import either, nearest_divisors
from llmtrain.config.rules.parallel import PARALLEL_RULES, WORLD_RULES
from llmtrain.config.schema import RunConfig
from llmtrain.errors import Problem

Found = Iterator[Problem]

HEAD = re.compile(r"(\[[^\[\]/]+\]|[^:/\s]+):\d+")
"""`host:port`, or `[host]:port` where the host has colons itself."""

NO_HEAD = (
    "must be host:port of the cluster's head, such as 10.0.0.1:6379, or auto. Addresses of Ray's client (ray://) and "
    "of its jobs (http://) do not fit; for jobs, see `llmtrain submit --to ray`."
)


def only_ray_has_a_cluster(config: RunConfig) -> Found:
    launch = config.launch
    keys = {
        "min_workers": launch.min_workers,
        "ray_address": launch.ray_address,
        "allow_open_cluster": "true" if launch.allow_open_cluster else None,
        "pass_environment": list(launch.pass_environment) or None,
    }
    for name, value in keys.items():
        if launch.backend != "ray" and value is not None:
            message = f"has no effect with launch.backend = {launch.backend}. Remove it, or try launch.backend=ray."
            yield Problem(f"launch.{name}", message, value, uses=("launch.backend",))


def fewest_workers_can_train(config: RunConfig) -> Found:
    """With launch.min_workers ranks the run must be as legal as with launch.num_workers."""
    launch, least = config.launch, config.launch.min_workers
    if launch.backend != "ray" or least is None:
        return
    uses = ("launch.num_workers", "launch.backend")
    if least > launch.num_workers:
        message = f"must be at most launch.num_workers = {launch.num_workers}. Try {launch.num_workers}."
        yield Problem("launch.min_workers", message, least, uses=uses)
    elif any(True for rule in PARALLEL_RULES for _ in rule(config)):
        return
    elif not _is_legal(config, least) and _is_legal(config, launch.num_workers):
        replica = config.parallel.replica_size
        legal = [size for size in range(replica, launch.num_workers + 1, replica) if _is_legal(config, size)]
        tries = either(sorted(sorted(legal, key=lambda size: abs(size - least))[:3]))
        message = (
            f"does not fit this run: it must be a multiple of {replica} (parallel.tensor x pipeline x "
            f"context) that divides train.global_batch_size = {config.train.global_batch_size} into whole "
            f"micro-batches. Try {tries}."
        )
        axes = ("parallel", "train.global_batch_size", "train.micro_batch_size")
        yield Problem("launch.min_workers", message, least, uses=(*uses, *axes))


def cluster_has_an_address(config: RunConfig) -> Found:
    address = config.launch.ray_address
    if address is not None and address not in ("auto", "local") and not HEAD.fullmatch(address):
        yield Problem("launch.ray_address", NO_HEAD, address)


def passed_variables_are_no_secrets(config: RunConfig) -> Found:
    for number, name in enumerate(config.launch.pass_environment):
        key = f"launch.pass_environment.{number}"
        if not VARIABLE_PATTERN.fullmatch(name):
            yield Problem(key, "must be the name of a variable, or its beginning and *, such as MY_*.", name)
        elif is_secret_variable(name.removesuffix("*")):
            message = (
                "looks like a secret, which Ray would keep and show. Give it to Ray itself, in the environment of "
                "`ray start` on each machine."
            )
            yield Problem(key, message, name)
        elif is_fixed_variable(name):
            yield Problem(key, "belongs to one process or one machine, and is never passed on. Remove it.", name)


def slurm_nodes_are_filled_evenly(config: RunConfig) -> Found:
    if config.launch.backend == "slurm":
        yield from uneven_nodes(config)


def uneven_nodes(config: RunConfig) -> Found:
    """The ranks of a job are spread over its machines evenly, whoever starts them."""
    nodes, ranks = config.launch.slurm.nodes, config.launch.num_workers
    if ranks % nodes:
        message = f"must divide launch.num_workers = {ranks}. Try {either(nearest_divisors(ranks, nodes))}."
        yield Problem("launch.slurm.nodes", message, nodes, uses=("launch.num_workers", "launch.backend"))


def _is_legal(config: RunConfig, num_workers: int) -> bool:
    return not any(True for rule in WORLD_RULES for _ in rule(config, num_workers))


LAUNCH_RULES = (
    only_ray_has_a_cluster,
    fewest_workers_can_train,
    cluster_has_an_address,
    passed_variables_are_no_secrets,
    slurm_nodes_are_filled_evenly,
)
