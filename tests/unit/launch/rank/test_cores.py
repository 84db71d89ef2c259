"""Threads of a rank: what the user says, else what the machine has for the run. Never a starter's own number."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from launch.forking.environment import changed_environment
from launch.rank.cores import (
    RECORD,
    WAITING,
    cpu_quota,
    memory_limit,
    num_threads,
    record_of_user,
    set_threads,
    usable_cores,
    user_threads,
)
from llmtrain.config.launch import LaunchConfig
from llmtrain.errors import ConfigError

GIB = 1 << 30


def groups(root: Path, lines: str, files: Mapping[str, str] | None = None) -> Path:
    """A root folder in which a process belongs to these control groups, with these files below sys/fs/cgroup."""
    (root / "proc" / "self").mkdir(parents=True, exist_ok=True)
    (root / "proc" / "self" / "cgroup").write_text(lines)
    for name, content in (files or {}).items():
        file = root / "sys" / "fs" / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n")
    return root


def test_cores_are_shared_among_the_ranks_of_a_machine() -> None:
    cores = usable_cores()
    assert num_threads(LaunchConfig(), 1, {}) == cores
    assert num_threads(LaunchConfig(), 2, {}) == max(1, cores // 2)
    assert num_threads(LaunchConfig(), 10**6, {}) == 1


def test_the_configuration_goes_before_the_environment_and_that_before_the_machine() -> None:
    user = {"OMP_NUM_THREADS": "5"}
    assert num_threads(LaunchConfig(), 2, user) == 5
    assert num_threads(LaunchConfig(threads_per_worker=3), 2, user) == 3
    assert user_threads({"OMP_NUM_THREADS": " 4,2"}) == 4
    assert user_threads({"OMP_NUM_THREADS": ""}) is user_threads({}) is None


@pytest.mark.parametrize("text", ["many", "0", "-1", "2.5"])
def test_what_is_no_number_of_threads_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=f"OMP_NUM_THREADS = {text}, in the environment: must be a whole number"):
        user_threads({"OMP_NUM_THREADS": text})


def test_what_the_user_had_is_known_after_the_variable_is_overwritten() -> None:
    for user in ({"OMP_NUM_THREADS": "3"}, {}):
        with changed_environment(user, without={"OMP_NUM_THREADS", RECORD, *WAITING} - set(user)):
            before = num_threads(LaunchConfig(), 1)
            set_threads(num_threads(LaunchConfig(), 4))
            set_threads(num_threads(LaunchConfig(), 2))
            assert num_threads(LaunchConfig(), 1) == before
            assert os.environ["GOMP_SPINCOUNT"] == "1000"


def test_a_policy_of_waiting_that_the_user_has_set_stays() -> None:
    assert record_of_user({"OMP_WAIT_POLICY": "ACTIVE"}) == {RECORD: "", "OMP_WAIT_POLICY": "ACTIVE"}
    assert record_of_user({"GOMP_SPINCOUNT": "9", "OMP_NUM_THREADS": "2"}) == {RECORD: "2", "GOMP_SPINCOUNT": "9"}


def test_ray_s_own_number_in_a_job_is_not_the_user_s() -> None:
    job = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}
    assert user_threads({**job, "OMP_NUM_THREADS": "1"}) is None
    assert user_threads({**job, "OMP_NUM_THREADS": "2"}) == 2
    assert user_threads({**job, "OMP_NUM_THREADS": "1", RECORD: "1"}) == 1


@pytest.mark.parametrize(("user", "ranks_have"), [("", "None"), ("1", "1"), ("3", "3")])
def test_torchrun_s_own_number_is_not_the_user_s(user: str, ranks_have: str) -> None:
    """A process that, as torchrun does, sets the variable after its own start, for a child."""
    code = "import os; from launch.rank.cores import user_threads; print(user_threads(os.environ))"
    starter = "import os, subprocess, sys; os.environ.setdefault('OMP_NUM_THREADS', '1'); "
    starter += "subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"
    environ = {**os.environ, "TORCHELASTIC_RUN_ID": "none"}
    environ.pop(RECORD, None)
    environ.pop("OMP_NUM_THREADS", None)
    environ |= {"OMP_NUM_THREADS": user} if user else {}
    line = [sys.executable, "-c", starter, code]
    assert subprocess.run(line, env=environ, capture_output=True, text=True, check=True).stdout.strip() == ranks_have


def test_no_more_cores_are_used_than_a_container_may(tmp_path: Path) -> None:
    cores = usable_cores(groups(tmp_path, "0::/\n"))
    for quota, usable in (("150000", 1), ("20000", 1), ("99900000", cores), ("max", cores)):
        assert usable_cores(groups(tmp_path, "0::/\n", {"cpu.max": f"{quota} 100000"})) == usable


def test_quotas_of_version_2_are_those_of_all_groups_around(tmp_path: Path) -> None:
    lines = "0::/job.slice/step\n"
    assert cpu_quota(groups(tmp_path, lines)) is memory_limit(groups(tmp_path, lines)) is None
    files = {"job.slice/step/cpu.max": "max 100000", "job.slice/cpu.max": "350000 100000", "memory.max": "max"}
    assert cpu_quota(groups(tmp_path, lines, files)) == 3.5
    files = {"job.slice/step/memory.max": f"{2 * GIB}", "job.slice/memory.max": f"{GIB}"}
    assert memory_limit(groups(tmp_path, lines, files)) == GIB
    assert cpu_quota(groups(tmp_path, "0::/../job.slice\n")) == 3.5  # as a container within a container sees it


def test_quotas_of_version_1(tmp_path: Path) -> None:
    lines = "7:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n1:cpuset:/docker/abc\n0::/\n"
    files = {
        "cpu,cpuacct/cpu.cfs_quota_us": "250000",  # within a container, its own group is the root
        "cpu,cpuacct/cpu.cfs_period_us": "100000",
        "memory/memory.limit_in_bytes": "9223372036854771712",
    }
    root = groups(tmp_path, lines, files)
    assert (cpu_quota(root), memory_limit(root)) == (2.5, None)
    files = {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "memory/docker/abc/memory.limit_in_bytes": f"{GIB}"}
    root = groups(tmp_path, lines, files)
    assert (cpu_quota(root), memory_limit(root)) == (None, GIB)
