"""The place of a process among those of a run, as its launcher says. Pure: imports no torch."""

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from llmtrain.errors import LaunchError

FIRST_PORT, NUM_PORTS = 10_000, 20_000
"""Ports below those that systems give out by themselves (Linux from 32768, others from 49152)."""


@dataclass(frozen=True)
class Rank:
    """A process's place among those of a run, and where they meet.

    `rank` counts over all machines, `local_rank` over this one. All ranks meet at a store on `host`:`port`, which this
    process serves where `serves_store`. `attempt` counts the starts of one launch. `device` is the number of its GPU
    among those that it sees, absent: its local rank. `launch_id` is shared by all attempts of a launcher that knows
    when none of an earlier attempt's ranks is left; empty where nobody does.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    host: str = "127.0.0.1"
    port: int = 0
    serves_store: bool = False
    attempt: int = 0
    device: int | None = None
    launch_id: str = ""

    def __str__(self) -> str:
        return f"rank {self.rank} on {socket.gethostname()}"


ALONE = Rank()


def rank_from_environment(environment: Mapping[str, str]) -> Rank | None:
    """The place that torchrun or srun gives this process; None where neither started it.

    Raises LaunchError where the variables contradict themselves.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return _checked(_from_torchrun(environment))
    # A batch script has SLURM_PROCID and SLURM_NTASKS too, though it is no task: only srun sets the step's size.
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in environment:
        return _checked(_from_srun(environment))
    return None


def first_host(node_list: str) -> str:
    """The first name of a Slurm node list: `node[07-09,12],other` begins with `node07`."""
    match = re.match(r"([^\[,]*)(?:\[([^\],-]+)[^\]]*\])?([^\[,]*)", node_list)
    return "".join(part or "" for part in match.groups()) if match else ""


def _from_torchrun(environment: Mapping[str, str]) -> Rank:
    rank, world_size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    # torchrun's agent serves the store itself; other launchers that set the same variables leave it to rank 0.
    agent = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Rank(
        rank,
        world_size,
        _number(environment, "LOCAL_RANK", 0 if world_size == 1 else rank),
        _number(environment, "LOCAL_WORLD_SIZE", world_size),
        environment.get("MASTER_ADDR", "127.0.0.1"),
        _number(environment, "MASTER_PORT", 0 if world_size == 1 else None),
        serves_store=rank == 0 and not agent,
        attempt=_number(environment, "TORCHELASTIC_RESTART_COUNT", 0),
    )


def _from_srun(environment: Mapping[str, str]) -> Rank:
    rank = _number(environment, "SLURM_PROCID")
    job, step = _number(environment, "SLURM_JOB_ID"), _number(environment, "SLURM_STEP_ID", 0)
    # Tasks of the nodes in order, as in `4(x2),3`; SLURM_NODEID says which of them this is.
    counts = [
        int(count)
        for count, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
        for _ in range(int(repeats or 1))
    ]
    node = _number(environment, "SLURM_NODEID", 0)
    return Rank(
        rank,
        _number(environment, "SLURM_STEP_NUM_TASKS"),
        _number(environment, "SLURM_LOCALID"),
        counts[node] if node < len(counts) else 1,
        environment.get("MASTER_ADDR") or _slurm_host(environment),
        _number(environment, "MASTER_PORT", FIRST_PORT + (31 * job + step) % NUM_PORTS),
        serves_store=rank == 0,
        attempt=_number(environment, "SLURM_RESTART_COUNT", 0),
    )


def _slurm_host(environment: Mapping[str, str]) -> str:
    """The machine of rank 0. Node names need not be known to the resolver; then it is where srun was called."""
    first = first_host(environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", ""))
    try:
        socket.getaddrinfo(first, None)
    except OSError:
        return environment.get("SLURM_LAUNCH_NODE_IPADDR", first)
    return first


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not re.fullmatch(r"\d+", text):
        raise LaunchError(
            f"{name} = {text or ''}: must be a whole number where torchrun or srun has started this rank. "
            "To start the ranks from here, unset RANK and WORLD_SIZE."
        )
    return int(text)


def _checked(rank: Rank) -> Rank:
    if not (rank.rank < rank.world_size and rank.local_rank < rank.local_world_size <= rank.world_size):
        raise LaunchError(
            f"rank {rank.rank} of {rank.world_size}, local rank {rank.local_rank} of {rank.local_world_size}: the "
            "environment's numbers contradict each other. To start the ranks from here, unset RANK and WORLD_SIZE."
        )
    return rank
