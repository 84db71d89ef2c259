"""How a rank's device is chosen and set; without a GPU, by what would be set."""

import gc
import os
import threading

import pytest
import torch

from launch.rank.device import ATTENTION_BACKENDS, set_variables, settled, start_threads
from llmtrain.errors import ConfigError
from tests.unit.config.small_run import run

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_the_cpu_needs_no_variables() -> None:
    environment: dict[str, str] = {}
    set_variables(run(), CPU, environment)
    before = dict(os.environ)
    with settled(run(), CPU):
        assert not gc.isenabled(), "engines collect, at steps"
    assert (environment, dict(os.environ), gc.isenabled()) == ({}, before, True)


def test_segments_grow_and_tensor_ranks_have_one_queue() -> None:
    environment: dict[str, str] = {}
    set_variables(run(), GPU, environment)
    assert environment == {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    set_variables(run(parallel={"tensor": 2}, engine={"name": "megatron"}, launch={"num_workers": 2}), GPU, environment)
    assert environment["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_the_user_has_set_stays(name: str) -> None:
    environment = {name: "max_split_size_mb:512", "CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    before = dict(environment)
    set_variables(run(parallel={"tensor": 2}, engine={"name": "megatron"}, launch={"num_workers": 2}), GPU, environment)
    assert environment == before


def test_the_fastest_attention_comes_first_and_only_in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("PYTORCH_CUDA_ALLOC_CONF", "CUDA_DEVICE_MAX_CONNECTIONS"):
        monkeypatch.setenv(variable, "")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    before = torch._C._get_sdp_priority_order()
    with settled(run(), GPU):
        order = torch._C._get_sdp_priority_order()
        assert order[: len(ATTENTION_BACKENDS)] == [int(backend) for backend in ATTENTION_BACKENDS]
    assert torch._C._get_sdp_priority_order() == before


def test_a_run_that_is_to_be_deterministic_allows_no_other_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for variable in ("PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.setenv(variable, "")
    with settled(run(), GPU):
        assert not torch.are_deterministic_algorithms_enabled()
    with settled(run(train={"deterministic": True}), GPU):
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()


def test_threads_that_leave_no_room_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    before = torch.get_num_threads()
    start_threads(before)
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(ConfigError) as caught:
        start_threads(before)
    (problem,) = caught.value.problems
    assert (problem.key, problem.value) == ("launch.threads_per_worker", before)
    assert f"Try {os.cpu_count()}" in problem.message
