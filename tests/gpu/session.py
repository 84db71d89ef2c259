"""The device under test, how its work is timed, and findings that outlive what breaks."""

import json
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

State = Literal["ok", "wrong", "failed", "left out"]


@dataclass(frozen=True)
class Finding:
    """One line of the table. `value` is in `unit`; a check has none, and says by its state whether it holds."""

    name: str
    state: State = "ok"
    value: float | None = None
    unit: str = ""
    note: str = ""


Section = Callable[["Machine"], Iterator[Finding]]


@dataclass(frozen=True)
class Machine:
    """The device. `tiny` takes sizes that show on any machine that all runs; its figures mean nothing."""

    device: torch.device
    tiny: bool = False

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def sized(self, full: int, tiny: int) -> int:
        return tiny if self.tiny else full

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object], repeats: int = 10, warm_up: int = 3) -> float:
        """The median time of some work, from its start to the end of all that the device has to do for it."""
        times = []
        warm_up, repeats = (1, 1) if self.tiny else (warm_up, repeats)
        for number in range(warm_up + repeats):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            if number >= warm_up:
                times.append(time.perf_counter() - began)
        return median(times)

    def peak_bytes(self, work: Callable[[], object]) -> int:
        """Most memory of the device that some work has held, beside what was there before; 0 on a CPU."""
        if not self.on_gpu:
            work()
            return 0
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        work()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before


@dataclass
class Report:
    """The findings of all sections, written to a file after each of them: what was found stays, whatever breaks."""

    path: Path | None
    facts: dict[str, Any]
    sections: dict[str, list[Finding]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, section: Section, machine: Machine) -> None:
        began, found = time.monotonic(), self.sections.setdefault(name, [])
        try:
            for finding in section(machine):
                found.append(finding)
                print(line(finding), flush=True)
        except Exception as error:  # the next section may still run
            traceback.print_exc()
            found.append(Finding(name, "failed", note=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))
        self.seconds[name] = time.monotonic() - began
        if self.path is not None:
            self.path.write_text(json.dumps(self.to_json(), indent=1) + "\n", "utf-8")

    def to_json(self) -> dict[str, Any]:
        findings = {name: [asdict(finding) for finding in found] for name, found in self.sections.items()}
        return {"facts": self.facts, "seconds": self.seconds, "sections": findings}

    def to_text(self) -> str:
        """A table for a person; what is wrong or failed stands at its end once more."""
        lines = [f"{key}: {value}" for key, value in self.facts.items()]
        for name, found in self.sections.items():
            lines += ["", f"== {name} ({self.seconds[name]:.0f} s)", *map(line, found)]
        bad = [finding for found in self.sections.values() for finding in found if finding.state in ("wrong", "failed")]
        return "\n".join([*lines, "", f"{len(bad)} wrong or failed", *map(line, bad)])


def line(finding: Finding) -> str:
    value = "" if finding.value is None else f"{finding.value:,.4g} {finding.unit}"
    return f"{finding.state:<8}  {finding.name:<58}  {value:<24}  {finding.note}".rstrip()


def checked(name: str, error: float, bound: float, note: str = "") -> Finding:
    """A check that some difference is no larger than a bound."""
    return Finding(name, "ok" if error <= bound else "wrong", error, "", f"at most {bound:g}. {note}".strip())


def attempts(work: Mapping[str, Callable[[], Finding]]) -> Iterator[Finding]:
    """Each finding, or why there is none."""
    for name, find in work.items():
        try:
            yield find()
        except Exception as error:
            traceback.print_exc()
            yield Finding(name, "failed", note=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
