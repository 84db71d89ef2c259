"""`python -m tests.gpu [--tiny] [--out FILE] [SECTION ...]`: eight minutes of a GPU, as JSON and as a table.

Everything is tried on the CPU with --tiny before: on a GPU only the hardware is new. A section that fails is named, and
the next one runs. The exit code is 1 where something is wrong or failed.
"""

import argparse
import platform
import sys
import time
from pathlib import Path

import torch

from tests.gpu import correct, speed, steps
from tests.gpu.session import Machine, Report, Section

SECTIONS: dict[str, Section] = {
    "right": correct.section,
    "ceilings": speed.ceilings,
    "attention": speed.attention,
    "head": speed.head,
    "steps": steps.whole_steps,
    "experts": steps.experts,
    "engines": steps.engines,
    "profiles": steps.profiles,
}


def facts(machine: Machine) -> dict[str, object]:
    found: dict[str, object] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(machine.device) if machine.on_gpu else platform.processor() or "cpu",
        "tiny": machine.tiny,
        "linear_cross_entropy": hasattr(torch.nn.functional, "linear_cross_entropy"),
    }
    if machine.on_gpu:
        free, total = torch.cuda.mem_get_info(machine.device)
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        found |= {"free_bytes": free, "total_bytes": total}
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--tiny", action="store_true", help="sizes that show that all runs")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, help="where the findings go as JSON, after each section")
    parser.add_argument("--seconds", type=float, default=480.0, help="no section begins after so long")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"no section {', '.join(unknown)}. There are {', '.join(SECTIONS)}")
    on_gpu = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    machine = Machine(torch.device("cuda", 0) if on_gpu else torch.device("cpu"), options.tiny or not on_gpu)
    report, began = Report(options.out, facts(machine)), time.monotonic()
    for name in options.sections or SECTIONS:
        if time.monotonic() - began > options.seconds:
            print(f"no time left for {name}", file=sys.stderr)
            continue
        print(f"== {name}", flush=True)
        report.add(name, SECTIONS[name], machine)
    print(f"\n{report.to_text()}")
    return int(any(f.state in ("wrong", "failed") for found in report.sections.values() for f in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
