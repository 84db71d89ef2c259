"""The whole examination: most is read here, while processes of their own try out engines and imports."""

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from llmtrain.checks.doctor.findings import Finding, package_findings, pip_install, requirements, wanted
from llmtrain.checks.doctor.machine import machine_findings, output_of, service_findings
from llmtrain.checks.doctor.probe import PRECISIONS
from llmtrain.config.engines import DEFAULT_ENGINE, ENGINES

PROBE_SECONDS = 300.0
"""A probe that takes longer hangs; the slowest needs some seconds, and ten times that on a machine that is busy."""

IMPORTED = {
    "ray": "ray",
    "wandb": "wandb",
    "webdataset": "webdataset",
    "sentencepiece": "sentencepiece",
    "safetensors": "safetensors.torch",
    "transformers": "transformers.modeling_utils",  # the package itself imports nothing until it is used
    "tensorboard": "torch.utils.tensorboard",
}
"""Packages that are imported to see whether they work, by the module that says so. Engines show it of the others."""

OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that would make a probe think that it is one of many."""

Answer = Mapping[str, Any]

Tell = Callable[[str], object]
"""Hears what has been tried, at once."""


def examine(output_dir: Path, tell: Tell = lambda line: None) -> list[Finding]:
    """Look at everything. `output_dir` is where runs would be written."""
    began = time.monotonic()

    def done(what: str) -> None:
        tell(f"{time.monotonic() - began:4.0f} s  {what}")

    tell(f"steps with {', '.join(ENGINES)}, imports of {', '.join(IMPORTED)}: up to a minute")
    # Both at the same time; what they say in all is less than a pipe holds.
    with Probe("trials", *ENGINES) as trying, Probe("imports", *IMPORTED.values()) as importing:
        found = list(package_findings())
        machine = list(machine_findings(output_dir))
        gpus = output_of("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
        imported = importing.answer()
        done("imports")
        trials = trying.answer(done)
    # Where the process of all trials has died, that is the answer of each.
    answers = {name: trials.get(name, trials) for name in ("devices", "meeting", *(f"engine {e}" for e in ENGINES))}
    absent = {finding.name: "not installed" for finding in found if finding.state == "missing"}
    # A package that fails as torch itself does is not the broken one.
    errors = {name: imported.get("error") or imported.get(module) for name, module in IMPORTED.items()}
    broken = {name: error for name, error in errors.items() if error and error != answers["devices"].get("error")}
    found = [with_import_error(finding, broken, imported) for finding in found]
    found += [*machine, *device_findings(answers["devices"], gpus), meeting_finding("gloo", answers["meeting"])]
    if answers["devices"].get("gpus", 0) > 1:
        found.append(meeting_finding("nccl", ask("meeting", "cuda")))
    found += [engine_finding(name, answers[f"engine {name}"]) for name in ENGINES]
    return [*found, *service_findings(os.environ, {**broken, **absent})]


def ask(*probe: str) -> Answer:
    """The answer of a probe; `error` in words where it breaks, dies or hangs."""
    with Probe(*probe) as asked:
        return asked.answer()


class Probe:
    """A probe in a process of its own. None of its processes is left when the context ends."""

    def __init__(self, *probe: str) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in OF_A_RANK}
        environment.setdefault("OMP_NUM_THREADS", "1")
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - as long as it
        self._process = subprocess.Popen(
            probe_command(*probe),
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self._hangs = False
        self._alarm = threading.Timer(PROBE_SECONDS, self._end_hanging)

    def __enter__(self) -> "Probe":
        self._alarm.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._alarm.cancel()
        self._kill()
        self._process.communicate()
        self._errors.close()

    def answer(self, tell: Tell = lambda line: None) -> Answer:
        """All that it says, `tell` hearing of each part; `error` in words where it breaks, dies or hangs."""
        answers: dict[str, Any] = {}
        assert self._process.stdout
        for line in self._process.stdout:
            try:
                part = json.loads(line)
            except ValueError:  # torn, as its process ended
                break
            answers |= part
            for name in part:
                tell(name)
        code = self._process.wait()
        if self._hangs:
            return {**answers, "error": f"no answer within {PROBE_SECONDS:.0f} s"}
        if code not in (0, 1) or not answers:
            self._errors.seek(0)
            last = (self._errors.read().strip().splitlines() or ["nothing said"])[-1]
            return {**answers, "error": f"the process ended with {code}: {last}"}
        return answers

    def _end_hanging(self) -> None:
        self._hangs = True
        self._kill()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # its children too: they hold the pipe


def probe_command(*probe: str) -> list[str]:
    """The command line of a probe. -P: what lies in the working directory is not taken for a package."""
    return [sys.executable, "-P", "-m", "llmtrain.checks.doctor.probe", *probe]


def device_findings(answer: Answer, driver: str | None) -> Iterator[Finding]:
    """GPUs, as PyTorch sees them beside what `nvidia-smi` (`driver`: its lines; None: it is not here) says."""
    if "error" in answer:
        mend = pip_install("--force-reinstall", *(wanted(each) for each in requirements() if each.name == "torch"))
        yield Finding("devices", "torch", "broken", answer["error"], mend, needed=True)
        return
    lines = [f"{number} x {line}" for line, number in Counter((driver or "").splitlines()).items()]
    build = f"CUDA {answer['cuda_build']}" if answer["cuda_build"] else "a build without CUDA"
    if answer["gpus"]:
        text = f"{answer['gpus']} usable; torch {answer['torch']} with {build}"
        yield Finding("devices", "GPU", "ok", "; ".join([*lines, text]))
        nccl = "in this build of torch" if answer["nccl"] else "not in this build of torch"
        yield Finding("devices", "nccl", "ok" if answer["nccl"] else "missing", nccl)
    elif lines:
        text = f"{', '.join(lines)}, which torch {answer['torch']} ({build}) does not see"
        mend = "install a build of torch with CUDA, for this driver, into this environment"
        if answer["cuda_build"]:
            mend = "nvidia-smi   (is the driver new enough for that CUDA? Is CUDA_VISIBLE_DEVICES empty?)"
        yield Finding("devices", "GPU", "limited", text, mend)
    else:
        yield Finding("devices", "GPU", "missing", f"none; torch {answer['torch']}, {build}: training on the CPU")


def meeting_finding(name: str, answer: Answer) -> Finding:
    """The finding about two ranks that meet on this machine."""
    if "error" not in answer:
        return Finding("devices", name, "ok", "two ranks met on this machine and added up")
    kind = "cpu" if name == "gloo" else "cuda"
    mend = f"{shlex.join(probe_command('meeting', kind))}   (shows all of it)"
    return Finding("devices", name, "broken", answer["error"], mend)


def engine_finding(name: str, answer: Answer) -> Finding:
    """The finding about an engine: its abilities, and the reasons for what is missing."""
    needed = name == DEFAULT_ENGINE
    see = f"{shlex.join(probe_command('engine', name))}   (shows all of it)"
    if "error" in answer:
        return Finding("engines", name, "broken", answer["error"], see, needed)
    worked, failed = answer["worked"], answer["failed"]
    parts = [
        ", ".join(title for title in worked if title in PRECISIONS),
        ", ".join(title for title in worked if title not in PRECISIONS and title != "ZeRO 0"),
        f"{', '.join(answer['axes'])} parallel" if answer["axes"] else "",
    ]
    text = f"{'; '.join(part for part in parts if part) or 'nothing works'} on {answer['device']}"
    for title in PRECISIONS:
        if title in answer["refused"]:
            text += f". No {title}: {answer['refused'][title]}"
    if failed:
        first = next(iter(failed))
        text += f". Failed: {', '.join(failed)}. {first}: {failed[first]}"
        return Finding("engines", name, "limited" if worked else "broken", text, see, needed)
    return Finding("engines", name, "ok", text)


def with_import_error(finding: Finding, broken: Mapping[str, str], answer: Answer) -> Finding:
    """A package that is installed, and cannot be imported."""
    if finding.section != "packages" or finding.state != "ok" or finding.name not in broken:
        return finding
    (requirement,) = (wanted(each) for each in requirements() if each.name == finding.name)
    text = f"{finding.text} is installed, but cannot be imported: {broken[finding.name]}"
    culprit = answer.get(f"{IMPORTED[finding.name]} breaks in")
    if culprit is None or culprit == "torch":
        return Finding("packages", finding.name, "broken", text, pip_install("--force-reinstall", requirement))
    text = f"{text}, in the package {culprit}, which does not fit this torch or is damaged"
    mend = f"{shlex.quote(sys.executable)} -m pip uninstall {culprit}   (or install the {culprit} of this torch)"
    return Finding("packages", finding.name, "broken", text, mend)
