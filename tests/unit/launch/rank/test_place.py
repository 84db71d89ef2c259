"""Who this process is, out of what torchrun and srun say."""

import pytest

from launch.rank.place import ALONE, FIRST_PORT, NUM_PORTS, Rank, first_host, rank_from_environment
from llmtrain.errors import LaunchError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.7",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "2",
}
SRUN = {
    "SLURM_JOB_ID": "1042",
    "SLURM_STEP_ID": "3",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_NTASKS": "5",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "no-such-node[07-08,11]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
}


def test_nobody_started_it() -> None:
    assert rank_from_environment({"HOME": "/root"}) is None
    assert ALONE.world_size == 1


def test_torchrun() -> None:
    expected = Rank(5, 8, 1, 4, "10.0.0.7", 29400, serves_store=False, attempt=2)
    assert rank_from_environment(TORCHRUN) == expected


def test_rank_0_serves_the_store_where_no_agent_does() -> None:
    plain = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    assert rank_from_environment(plain) == Rank(0, 2, 0, 2, "localhost", 29500, serves_store=True)
    second = rank_from_environment({**plain, "RANK": "1"})
    assert second is not None and not second.serves_store


def test_srun() -> None:
    port = FIRST_PORT + (31 * 1042 + 3) % NUM_PORTS
    assert rank_from_environment(SRUN) == Rank(4, 5, 0, 1, "10.0.0.1", port, serves_store=False)
    first = {**SRUN, "SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_STEP_NODELIST": "localhost,other"}
    assert rank_from_environment(first) == Rank(0, 5, 0, 2, "localhost", port, serves_store=True)


def test_a_batch_script_is_no_task_of_its_job() -> None:
    script = {"SLURM_JOB_ID": "1042", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}
    assert rank_from_environment(script) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("RANK", "8"), ("RANK", "x"), ("LOCAL_RANK", "4"), ("LOCAL_WORLD_SIZE", "9"), ("MASTER_PORT", "")],
)
def test_contradictions_are_told(name: str, value: str) -> None:
    with pytest.raises(LaunchError, match="unset RANK and WORLD_SIZE"):
        rank_from_environment({**TORCHRUN, name: value})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("n[1-3,7],m2", "n1"), ("gpu[007-012]", "gpu007"), ("r[1-2]s", "r1s"), ("", "")],
)
def test_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
