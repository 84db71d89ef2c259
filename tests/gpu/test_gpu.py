"""The script for a GPU: whole and tiny on the CPU, so that only the hardware is new; on a GPU its checks, as tests."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.gpu import correct
from tests.gpu.__main__ import SECTIONS
from tests.gpu.session import Finding, Machine, Report, checked
from tests.support.readers import TORCHAO

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU here")
TINY = Machine(torch.device("cpu"), tiny=True)
NOT_ON_CPUS = ("compiled", "flex", "waits", "cudnn", "efficient", *(() if TORCHAO.is_dir() else ("fp8",)))


def test_all_of_it_runs_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "tests.gpu", "--tiny", "--device", "cpu", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(TORCHAO)}  # for products in float8, where it is installed
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False, env=environment)
    found = json.loads(out.read_text())
    assert done.returncode == 0, done.stdout
    assert list(found["sections"]) == list(SECTIONS)
    assert all(found["sections"].values())
    states = {finding["name"]: finding["state"] for section in found["sections"].values() for finding in section}
    assert set(states.values()) == {"ok", "left out"}
    left_out = [name for name, state in states.items() if state == "left out"]
    assert all(any(part in name for part in NOT_ON_CPUS) for name in left_out), left_out
    assert "0 wrong or failed" in done.stdout


def test_what_breaks_or_is_wrong_is_named_and_the_rest_runs(tmp_path: Path) -> None:
    def breaks(machine: Machine) -> Iterator[Finding]:
        yield Finding("before", "ok", 1.0, "ms")
        raise RuntimeError("CUDA error: an illegal memory access")

    def wrong(machine: Machine) -> Iterator[Finding]:
        yield checked("sum", 0.5, 0.1)

    report = Report(tmp_path / "gpu.json", {"device": "cpu"})
    report.add("first", breaks, TINY)
    report.add("second", wrong, TINY)
    found = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert [finding["state"] for finding in found["first"]] == ["ok", "failed"]
    assert found["second"][0]["state"] == "wrong"
    assert "2 wrong or failed" in report.to_text()


def test_weights_that_are_not_loaded_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correct.TorchEngine, "load", lambda self, source: None)
    assert correct.saved_and_loaded(TINY).state == "wrong"


def test_a_step_that_is_not_skipped_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("math.isfinite", lambda number: True)
    assert correct.skipped(TINY).state == "wrong"


@needs_gpu
def test_a_gpu_computes_what_the_cpu_computes() -> None:
    findings = list(correct.section(Machine(torch.device("cuda", 0))))
    assert [finding for finding in findings if finding.state != "ok"] == []
