"""`python -m tests.benchmarks [NAME ...] [--quick] [--json] [--rounds N]`: every figure beside its peers.

Nothing is asserted: a figure is read, not passed. Tables go to stdout as they are ready; with --json, one line with
one object for each benchmark.
"""

import argparse
import json
import sys
from contextlib import redirect_stdout
from importlib import import_module

from tests.benchmarks.machine import describe_machine
from tests.benchmarks.measuring import Options

BENCHMARKS = {
    "step": "a training step beside a bare loop, Hugging Face's GPT-2 and HF Trainer",
    "engines": "a step of each engine beside a bare loop, one rank",
    "overhead": "what loop, loader and trackers add to a step of about a millisecond",
    "trackers": "what Weights & Biases adds to a step: offline, and online without a server",
    "finetuning": "a LoRA beside PEFT in HF Trainer: speed and peak memory",
    "serving": "texts, many at a time, beside transformers and llama.cpp, and what a server adds",
    "graphs": "a step of decoding in onnxruntime beside PyTorch, plain and compiled",
    "packed": "texts with matrices in whole numbers beside dequantized ones, and transformers",
    "stream": "shards to packed batches beside webdataset and raw mmap",
    "resume": "how long the data stream takes to its first batch, far into a run",
    "sharding": "raw text to shards beside the tokenizer alone",
    "pipeline": "a data pipeline beside its own functions in a loop and in Ray Data; signatures beside datasketch's",
    "quality": "rules of quality for texts beside datatrove's filters",
    "checkpoint": "saving and loading a state beside raw files, torch.save, safetensors and DCP; training's stall",
    "resharding": "loading with another layout on two ranks beside DCP: time, bytes from the disk, peak memory",
    "command": "the command's help, and from command to first step",
    "launch": "from command to first step with 2 ranks, beside torchrun",
    "recovery": "from the death of a rank to the next finished step, beside torchrun",
    "cluster": "from command to first step, and from the death of a worker to the next, on Ray, beside Ray Train",
}
"""Each is the module tests.benchmarks.NAME with a function `benchmark(options) -> list[Table]`."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description="Benchmarks beside peers.",
        epilog="\n".join(f"{name:<12}{summary}" for name, summary in BENCHMARKS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(BENCHMARKS)}; none means all")
    parser.add_argument("--quick", action="store_true", help="small sizes and 2 rounds: shows that everything runs")
    parser.add_argument("--rounds", type=int, help="measurements of each contender (default: 5)")
    parser.add_argument("--json", action="store_true", help="JSON on stdout, one line for each benchmark")
    given = parser.parse_args(arguments)
    unknown = [name for name in given.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark named {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    options = Options(rounds=given.rounds or (2 if given.quick else 5), quick=given.quick)

    machine = describe_machine()
    if not given.json:
        print("\n".join(f"{key}: {value}" for key, value in machine.items()))
    for name in given.names or BENCHMARKS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        with redirect_stdout(sys.stderr):  # libraries print as they are imported
            tables = import_module(f"tests.benchmarks.{name}").benchmark(options)
        if given.json:
            result = {"benchmark": name, "machine": machine, "rounds": options.rounds, "quick": options.quick}
            print(json.dumps({**result, "tables": [table.to_json() for table in tables]}), flush=True)
        else:
            print("".join(f"\n{table.to_text()}\n" for table in tables), end="", flush=True)


if __name__ == "__main__":
    main()
