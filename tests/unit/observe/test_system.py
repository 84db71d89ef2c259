"""What the machine is doing: sampled seldom, rates since the sample before, and what it does not tell left out."""

from types import SimpleNamespace

import psutil
import pytest
import torch

from llmtrain.observe import machine
from llmtrain.observe.charts import chart_name
from llmtrain.observe.machine import SystemMeter

CPU = torch.device("cpu")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_sample_says_what_the_system_says(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, traffic = Clock(), SimpleNamespace(bytes_sent=1000, bytes_recv=5000)
    monkeypatch.setattr(
        machine, "_COUNTERS", ((lambda: traffic, machine._COUNTERS[0][1]), (lambda: None, {"disk": "x"}))
    )
    meter = SystemMeter(CPU, clock)
    clock.now, traffic.bytes_sent = 2.0, 4000
    columns = meter.sample()
    assert columns["system_network_sent_bytes_per_second"] == 1500
    assert columns["system_network_received_bytes_per_second"] == 0
    assert columns["resident_bytes"] == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)
    assert 0 < columns["system_memory_used_bytes"] < psutil.virtual_memory().total
    assert 0 <= columns["system_cpu_percent"] <= 100
    assert not [name for name in columns if "disk" in name]
    assert {chart_name(name).partition("/")[0] for name in columns} == {"system", "memory"}


def test_rows_that_follow_soon_carry_none() -> None:
    clock = Clock()
    meter = SystemMeter(CPU, clock)
    clock.now = 0.99
    assert meter.sample() == {}
    clock.now = 1.0
    assert meter.sample() != {}
    clock.now = 1.5
    assert meter.sample() == {}


def test_counters_that_fail_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> object:
        raise OSError("no such file: /proc/diskstats")

    clock = Clock()
    monkeypatch.setattr(machine, "_COUNTERS", ((refused, {"disk": "x"}),))
    meter = SystemMeter(CPU, clock)
    clock.now = 1.0
    assert "system_cpu_percent" in meter.sample()


def test_a_gpu_whose_driver_tells_nothing_still_has_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(device: torch.device) -> float:
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")

    questions = (("system_gpu_utilization_percent", lambda device: 93), ("system_gpu_power_watts", missing))
    monkeypatch.setattr(machine, "_GPU_QUESTIONS", questions)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 7)
    clock = Clock()
    meter = SystemMeter(torch.device("cuda", 1), clock)
    clock.now = 1.0
    columns = meter.sample()
    assert {name: columns[name] for name in columns if "gpu" in name or "device" in name} == {
        "device_allocated_bytes": 5,
        "device_reserved_bytes": 7,
        "system_gpu_utilization_percent": 93,
    }
