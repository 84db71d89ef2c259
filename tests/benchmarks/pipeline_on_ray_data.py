"""The functions of the pipeline benchmark in Ray Data's operators; prints the CPU seconds of all its processes."""

import os
import sys
from pathlib import Path

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import psutil
import ray
import ray.data

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.data_sets import TOKENIZER
from tests.benchmarks.pipeline import processed


def cpu_seconds() -> float:
    """Of this process and all that it has started."""
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(time.user + time.system for time in times)


def main(folder: Path) -> None:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    started = cpu_seconds()
    files = sorted(map(str, folder.glob("part-*.jsonl")))
    data = ray.data.read_json(files)
    count = data.map_batches(
        lambda batch: {"tokens": [processed(list(batch["text"]), folder / TOKENIZER)]}, batch_size=256
    )
    count.materialize()
    print(cpu_seconds() - started)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
