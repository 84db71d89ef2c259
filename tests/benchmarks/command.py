"""What a person waits for: the command's help, and the time from `llmtrain train` to the first finished step."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from llmtrain.config.reading.rendering import to_yaml
from tests.benchmarks.data_sets import write_text_data_set
from tests.benchmarks.measuring import Measurement, Options, Table, measure
from tests.benchmarks.peer_models import Shape
from tests.benchmarks.step import gpt2_run

SHAPE = Shape(num_layers=2, hidden_size=64, num_heads=2, vocab_size=512, seq_len=64, batch_size=4)
HELP = "llmtrain --help"
OURS = "llmtrain train, trackers off"
POLL_SECONDS = 0.002
REPOSITORY = Path(__file__).parents[2]
NO_TRACKERS = ("observe.wandb=off", "observe.tensorboard=false")

PLAIN_SCRIPT = """
from pathlib import Path
import sys
import torch
from tests.benchmarks.peer_models import PlainGPT, Shape, random_tokens
shape = {shape}
model = PlainGPT(shape)
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
tokens = random_tokens(shape, 1)[0]
loss = model(tokens[:, :-1], tokens[:, 1:])
loss.backward()
optimizer.step()
Path(sys.argv[1]).write_text(str(loss.item()))
"""
"""One step of a plain model on random tokens: what importing PyTorch and calling it costs by itself."""


def benchmark(options: Options) -> list[Table]:
    """Seconds of wall time; Python's own caches are warm after the unrecorded round."""
    llmtrain = str(Path(sysconfig.get_path("scripts")) / "llmtrain")
    warm_up = 0 if options.quick else 1
    helps: dict[str, Measurement] = {
        HELP: lambda: seconds_of([llmtrain, "--help"]),
        "python -c pass": lambda: seconds_of([sys.executable, "-c", "pass"]),
    }
    with tempfile.TemporaryDirectory() as folder:
        first_steps = ways_to_first_step(llmtrain, Path(folder))
        if options.quick:
            del first_steps["llmtrain train, default trackers"]
        return [
            Table("The command's help", "s", "lower", HELP, measure(helps, options.rounds, warm_up)),
            Table(
                "Command to first step of a tiny run", "s", "lower", OURS,
                measure(first_steps, options.rounds, warm_up),
            ),
        ]  # fmt: skip


def ways_to_first_step(llmtrain: str, root: Path) -> dict[str, Measurement]:
    """The command with and without trackers, and a script of a page's length."""
    train = [llmtrain, "train", str(write_run(root))]
    folder = root / "runs" / "benchmark"
    loss = root / "plain" / "loss"
    script = [sys.executable, "-c", PLAIN_SCRIPT.format(shape=SHAPE), str(loss)]
    return {
        OURS: lambda: seconds_to_output([*train, *NO_TRACKERS], folder / "metrics.jsonl"),
        "llmtrain train, default trackers": lambda: seconds_to_output(train, folder / "metrics.jsonl"),
        "plain script": lambda: seconds_to_output(script, loss),
        "python -c 'import torch'": lambda: seconds_of([sys.executable, "-c", "import torch"]),
    }


def write_run(root: Path) -> Path:
    """A run of one step on real shards, as a file."""
    train_split = write_text_data_set(root, SHAPE.vocab_size, num_documents=10)
    changes = {
        "data": {"train": [{"path": str(train_split)}]},
        "train": {"steps": 1},
        "checkpoint": {"every_steps": 0},
    }
    config = gpt2_run(SHAPE, changes).with_keys({"output_dir": str(root / "runs")})
    file = root / "run.yaml"
    file.write_text(to_yaml(config), "utf-8")
    return file


def seconds_of(command: Sequence[str]) -> float:
    """From start to end of a process that must succeed."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def seconds_to_output(command: Sequence[str], file: Path, environ: Mapping[str, str] = os.environ) -> float:
    """From the start of a process to the moment when `file`, in a fresh folder, holds something."""
    shutil.rmtree(file.parent, ignore_errors=True)
    file.parent.mkdir(parents=True)
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=REPOSITORY, env=environ)
        seconds = None
        while seconds is None and process.poll() is None:
            if file.exists() and file.stat().st_size:
                seconds = time.perf_counter() - started
            else:
                time.sleep(POLL_SECONDS)
        if process.wait() or not (file.exists() and file.stat().st_size):
            output.seek(0)
            raise RuntimeError(f"{' '.join(command[:3])} wrote no {file.name}: {output.read().decode()[-2000:]}")
        return seconds or time.perf_counter() - started
