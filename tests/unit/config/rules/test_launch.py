"""How ranks are started: what is refused says what fits, and what fits is accepted."""

from typing import Any

import pytest

from tests.unit.config.small_run import broken, run

RAY = {"backend": "ray"}
FOUR = {**RAY, "num_workers": 4}
EIGHT_SAMPLES = {"global_batch_size": 8, "micro_batch_size": 1}


def launch_problems(launch: dict[str, Any], **sections: Any) -> dict[str, str]:
    return broken(run(launch=launch, **sections), launch.get("num_workers", 1))


@pytest.mark.parametrize(
    ("key", "value"),
    [("min_workers", 1), ("ray_address", "auto"), ("allow_open_cluster", True), ("pass_environment", ["MY_*"])],
)
@pytest.mark.parametrize("backend", ["local", "slurm"])
def test_what_is_for_ray_only(backend: str, key: str, value: Any) -> None:
    message = launch_problems({"backend": backend, key: value})[f"launch.{key}"]
    assert f"no effect with launch.backend = {backend}" in message and "launch.backend=ray" in message
    assert launch_problems({**RAY, key: value}) == {}


@pytest.mark.parametrize("address", ["10.0.0.1:6379", "head.cluster:6379", "[fd00::1]:6379", "auto", "local"])
def test_addresses_of_heads(address: str) -> None:
    assert launch_problems({**RAY, "ray_address": address}) == {}


@pytest.mark.parametrize(
    "address",
    ["", "head", "head:", ":6379", "head:port", "ray://head:10001", "http://head:8265", "fd00::1:6379", "a b:1"],
)
def test_what_is_no_address_of_a_head(address: str) -> None:
    message = launch_problems({**RAY, "ray_address": address})["launch.ray_address"]
    assert "must be host:port of the cluster's head" in message and "auto" in message


def test_fewer_ranks_must_train_too() -> None:
    train = {"global_batch_size": 12, "micro_batch_size": 1}
    assert launch_problems({**FOUR, "min_workers": 3}, train=train) == {}
    assert launch_problems({**FOUR, "min_workers": 2}, train=EIGHT_SAMPLES) == {}
    message = launch_problems({**FOUR, "min_workers": 3}, train=EIGHT_SAMPLES)["launch.min_workers"]
    assert "Try 1, 2 or 4." in message
    message = launch_problems({**FOUR, "min_workers": 5}, train=EIGHT_SAMPLES)["launch.min_workers"]
    assert "at most launch.num_workers = 4" in message
    tensor = {"engine": {"name": "megatron"}, "parallel": {"tensor": 2}}
    message = launch_problems({**FOUR, "min_workers": 3}, train=EIGHT_SAMPLES, **tensor)["launch.min_workers"]
    assert "a multiple of 2" in message and "Try 2 or 4." in message
    assert launch_problems({**FOUR, "min_workers": 2}, train=EIGHT_SAMPLES, **tensor) == {}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("HF_TOKEN", "looks like a secret"),
        ("WANDB_API_KEY", "looks like a secret"),
        ("AWS_SECRET*", "looks like a secret"),
        ("MY-SETTING", "must be the name of a variable"),
        ("*", "must be the name of a variable"),
        ("A=B", "must be the name of a variable"),
        ("HOME", "never passed on"),
        ("RANK", "never passed on"),
    ],
)
def test_variables_that_are_not_passed(name: str, says: str) -> None:
    message = launch_problems({**RAY, "pass_environment": ["MY_SETTING", name]})["launch.pass_environment.1"]
    assert says in message


def test_machines_of_a_job_are_filled_evenly() -> None:
    slurm = {"backend": "slurm", "num_workers": 4}
    assert launch_problems({**slurm, "slurm": {"nodes": 2}}, train=EIGHT_SAMPLES) == {}
    message = launch_problems({**slurm, "slurm": {"nodes": 3}}, train=EIGHT_SAMPLES)["launch.slurm.nodes"]
    assert "must divide launch.num_workers = 4. Try 1, 2 or 4." in message
