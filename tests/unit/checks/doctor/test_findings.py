"""What the doctor says of packages, machines, devices, engines and services that are not as they should be."""

import errno
import os
import resource
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from llmtrain.checks.doctor import machine
from llmtrain.checks.doctor.examination import device_findings, engine_finding, meeting_finding
from llmtrain.checks.doctor.findings import (
    Finding,
    can_train,
    package_finding,
    package_findings,
    pip_install,
    requirements,
)

RAY = Requirement("ray[default,data]>=2.54")


def version(text: str | None) -> Callable[[str], str]:
    def version_of(name: str) -> str:
        if text is None:
            raise metadata.PackageNotFoundError(name)
        return text

    return version_of


@pytest.mark.parametrize(
    ("installed", "state", "says"),
    [
        ("2.60.0", "ok", "2.60.0"),
        ("2.54.0rc1", "broken", "2.54.0rc1 is installed; llmtrain needs >=2.54"),
        ("2.10.0", "broken", "2.10.0 is installed; llmtrain needs >=2.54"),
        (None, "missing", "not installed; llmtrain needs >=2.54"),
    ],
)
def test_a_package_beside_its_range(installed: str | None, state: str, says: str) -> None:
    finding = package_finding(RAY, version(installed))
    assert (finding.state, finding.text, finding.needed) == (state, says, False)
    assert finding.mend.endswith("pip install 'ray[data,default]>=2.54'") == (state != "ok")


def test_a_local_build_of_torch_is_in_its_range() -> None:
    (torch,) = (requirement for requirement in requirements() if requirement.name == "torch")
    assert package_finding(torch, version("2.13.0+cpu")).state == "ok"
    missing = package_finding(torch, version(None))
    assert missing.needed and not can_train([missing])


def test_all_packages_of_the_metadata_are_looked_at() -> None:
    names = [finding.name for finding in package_findings()]
    assert names[0] == "Python" and {"torch", "megatron-core", "deepspeed", "ray", "wandb"} < set(names)
    assert not {"pytest", "s3fs"} & set(names), "extras are not missed"


def test_pip_is_that_of_this_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert pip_install("a>=1") == "pip install 'a>=1'"
    other = tmp_path / "pip"
    other.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert pip_install("a>=1") == f"{sys.executable} -m pip install 'a>=1'"


def test_training_needs_what_is_needed_only() -> None:
    optional = Finding("launchers", "ray", "broken", "")
    assert can_train([optional, Finding("engines", "torch", "limited", "", needed=True)])
    assert not can_train([optional, Finding("engines", "torch", "broken", "", needed=True)])


GIB = 1 << 30


@pytest.mark.parametrize(
    ("finding", "state", "says"),
    [
        (machine.cpu_finding(8, 8, None), "ok", "8 of 8 cores"),
        (machine.cpu_finding(2, 8, None), "limited", "2 of 8 cores"),
        (machine.cpu_finding(8, 8, 1.5), "limited", "a quota of 1.5 cores"),
        (machine.cpu_finding(2, 2, None, load=3.9), "ok", "2 of 2 cores"),
        (machine.cpu_finding(2, 2, None, load=19.2), "limited", "2 of 2 cores usable, and 19 processes want them"),
        (machine.memory_finding(8 * GIB, 4 * GIB, None), "ok", "8.0 GiB, 4.0 GiB of it free"),
        (machine.memory_finding(8 * GIB, 4 * GIB, 2 * GIB), "limited", "may have 2.0 GiB (cgroup)"),
        (machine.shared_memory_finding(64 << 20), "limited", "little for NCCL and Ray"),
        (machine.shared_memory_finding(4 * GIB), "ok", "4.0 GiB"),
        (machine.limit_finding("open files", 1024, 4096, "-n"), "limited", "1,024 (ulimit -n)"),
        (machine.limit_finding("open files", resource.RLIM_INFINITY, 4096, "-n"), "ok", "no limit"),
        (machine.locked_memory_finding(resource.RLIM_INFINITY), "ok", "no limit"),
        (machine.clock_finding(False), "limited", "set by nobody"),
        (machine.clock_finding(None), "ok", "UTC"),
    ],
)
def test_the_machine(finding: Finding, state: str, says: str) -> None:
    assert finding.state == state and says in finding.text
    assert not finding.needed
    # A container's memory is what it is; for all else there is something to do.
    assert bool(finding.mend) == (state != "ok" and finding.name != "memory")


def test_the_output_folder(tmp_path: Path) -> None:
    found = machine.disk_finding(tmp_path / "runs" / "later")
    assert found.state == "ok" and "free" in found.text
    assert list(tmp_path.iterdir()) == [], "nothing is left there"
    refused = machine.disk_finding(Path("/proc/runs"))
    assert (refused.state, refused.needed) == ("broken", True)
    assert "/proc cannot be written" in refused.text and "output_dir=" in refused.mend
    (tmp_path / "file").touch()
    for wanted, fault in (("file/runs", "is a file"), ("x" * 300, "File name too long")):
        refused = machine.disk_finding(tmp_path / wanted)
        assert (refused.state, refused.needed) == ("broken", True) and fault in refused.text


def test_an_output_folder_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    refused = machine.disk_finding(tmp_path)
    assert (refused.state, refused.needed) == ("broken", True) and "has no hard links" in refused.text


def test_a_command_that_fails_or_is_not_here_says_nothing() -> None:
    assert machine.output_of("no-such-command") is None
    assert machine.output_of(sys.executable, "-c", "raise SystemExit(1)") is None
    assert machine.output_of(sys.executable, "-c", "print(7)") == "7"


def gpu(gpus: int = 0, cuda_build: str | None = None) -> dict[str, object]:
    return {"torch": "2.13.0", "cuda_build": cuda_build, "gpus": gpus, "gloo": True, "nccl": gpus > 0}


H100 = "NVIDIA H100, 81559 MiB, 570.1"


@pytest.mark.parametrize(
    ("answer", "driver", "state", "says"),
    [
        (gpu(), None, "missing", "training on the CPU"),
        (gpu(2, "12.8"), f"{H100}\n{H100}", "ok", f"2 x {H100}; 2 usable; torch 2.13.0 with CUDA 12.8"),
        (gpu(), H100, "limited", "a build without CUDA) does not see"),
        (gpu(cuda_build="12.8"), H100, "limited", "CUDA 12.8) does not see"),
        ({"error": "ImportError: libx.so"}, None, "broken", "ImportError: libx.so"),
    ],
)
def test_devices(answer: dict[str, object], driver: str | None, state: str, says: str) -> None:
    first, *_ = device_findings(answer, driver)
    assert first.state == state and says in first.text
    assert bool(first.mend) == (state in ("limited", "broken"))
    assert can_train([first]) == (state != "broken")


def answered(**changes: object) -> dict[str, object]:
    answer = {"device": "cpu", "worked": ["fp32", "ZeRO 0"], "failed": {}, "refused": {}, "axes": ["tensor"]}
    return {**answer, **changes}


def test_engines() -> None:
    right = engine_finding("megatron", answered(refused={"fp16": "it has none.", "ZeRO 3": "not told"}))
    assert (right.state, right.text) == ("ok", "fp32; tensor parallel on cpu. No fp16: it has none.")
    partly = engine_finding("torch", answered(failed={"bf16": "TypeError: no"}))
    assert (partly.state, partly.needed) == ("limited", True)
    assert partly.text.endswith("Failed: bf16. bf16: TypeError: no")
    assert "-m llmtrain.checks.doctor.probe engine torch" in partly.mend
    for answer in (answered(worked=[], failed={"fp32": "E: no"}), {"error": "E: no"}):
        broken = engine_finding("deepspeed", answer)
        assert (broken.state, broken.needed) == ("broken", False) and "E: no" in broken.text


def test_ranks_that_do_not_meet() -> None:
    broken = meeting_finding("gloo", {"error": "RuntimeError: no interface"})
    assert broken.state == "broken" and "probe meeting cpu" in broken.mend


CANARY = "canary-0123456789"


def test_wandb_and_ray_tell_where_a_secret_is_and_not_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    absent = machine.wandb_finding({})
    assert (absent.state, absent.mend) == ("limited", "wandb login")
    by_key = machine.wandb_finding({"WANDB_API_KEY": CANARY, "WANDB_MODE": "online"})
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai login user password {CANARY}\n")
    (tmp_path / ".netrc").chmod(0o600)
    by_file = machine.wandb_finding({})
    other = machine.wandb_finding({"WANDB_BASE_URL": "https://wandb.example.org"})
    assert (by_key.state, by_file.state, other.state) == ("ok", "ok", "limited")
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text(CANARY)
    token.chmod(0o644)
    open_file = machine.ray_finding({"RAY_ADDRESS": "10.0.0.1:6379"})
    assert (open_file.state, open_file.mend) == ("limited", f"chmod 600 {token}")
    token.chmod(0o600)
    rays = [machine.ray_finding({}), machine.ray_finding({"RAY_AUTH_TOKEN": CANARY})]
    assert [finding.state for finding in rays] == ["ok", "ok"]
    assert CANARY not in str([by_key, by_file, other, open_file, *rays])


def executable(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def test_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    missing = machine.slurm_finding({})
    assert missing.state == "missing" and "apt-get install slurm-client" in missing.mend
    for name in ("sbatch", "srun", "sinfo"):
        executable(tmp_path, name, "exit 1")
    assert "neither its configuration" in machine.slurm_finding({}).text
    executable(tmp_path, "sbatch", "echo slurm 22.05.8")
    assert "controller does not answer" in machine.slurm_finding({}).text
    executable(tmp_path, "sinfo", "echo 'main*'; echo debug")
    assert machine.slurm_finding({}).text == "slurm 22.05.8; partitions: main*, debug"
    inside = machine.slurm_finding({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"})
    assert inside.text == "slurm 22.05.8; inside of job 7, of 2 nodes"


def test_what_cannot_be_imported_is_told_once() -> None:
    names = {finding.name for finding in machine.service_findings(os.environ, {"ray": "E", "wandb": "E"})}
    assert names == {"local", "slurm"}
