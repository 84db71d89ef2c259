"""Runs on Ray with two ranks, beside Ray Train: from command to first step, and from a death to the next step."""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import psutil

from tests.benchmarks.command import REPOSITORY, SHAPE, seconds_to_output, write_run
from tests.benchmarks.launch import TWO_RANKS
from tests.benchmarks.measuring import Measurement, Options, Table, measure
from tests.support.ray_cluster import ray_head

OURS_COLD = "llmtrain train, a Ray of its own"
OURS_WARM = "llmtrain train, running cluster"
OURS_BACK = "llmtrain, rank killed"
STEPS, FAULT_STEP, SAVE_EVERY = 2000, 23, 5
AFTER_FAULT = 200
"""Steps after which a run that has come back is ended."""

RAY_TRAIN_SCRIPT = """
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
import ray
from ray import train
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model
folder = Path(sys.argv[1])

def loop():
    import torch
    import torch.distributed as dist
    from tests.benchmarks.peer_models import PlainGPT, Shape, random_tokens
    shape = {shape}
    torch.manual_seed(0)
    model = prepare_model(PlainGPT(shape))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    rows = shape.batch_size // dist.get_world_size()
    first, latest = 1, train.get_checkpoint()
    if latest:
        with latest.as_directory() as saved:
            state = torch.load(Path(saved) / "state.pt")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"] + 1
    for step in range(first, {steps} + 1):
        tokens = random_tokens(shape, step)[0][dist.get_rank() * rows :][:rows]
        if step == {fault_step} and dist.get_rank() == 1 and not (folder / "killed").exists():
            (folder / "killed").write_text(repr(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0 and step == 1:
            (folder / "loss").write_text(str(loss.item()))
        if dist.get_rank() == 0 and first > 1 and not (folder / "back").exists():
            (folder / "back").write_text(repr(time.time()))
        if step % {save_every} == 0:
            with tempfile.TemporaryDirectory() as local:
                state = {{"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}}
                if dist.get_rank() == 0:
                    torch.save(state, Path(local) / "state.pt")
                saved = Checkpoint.from_directory(local) if dist.get_rank() == 0 else None
                train.report({{"step": step}}, checkpoint=saved)

address = os.environ.get("BENCHMARK_CLUSTER") or "local"
sizes = dict(num_cpus=3, include_dashboard=False) if address == "local" else dict()
ray.init(address=address, log_to_driver=False, runtime_env=dict(env_vars=dict(PYTHONPATH=os.getcwd())), **sizes)
run = RunConfig(storage_path=str(folder / "storage"), failure_config=FailureConfig(max_failures=2))
TorchTrainer(loop, scaling_config=ScalingConfig(num_workers=2), run_config=run).fit()
"""
"""A plain model on random tokens that saves and continues as Ray Train's documentation shows."""


def benchmark(options: Options) -> list[Table]:
    """Seconds of wall time; each rank computes in one thread."""
    warm_up = 0 if options.quick else 1
    with tempfile.TemporaryDirectory() as folder, ray_head(num_cpus=4) as head:
        root, run = Path(folder), write_run(Path(folder))
        on_cluster = {**os.environ, **head.environ, **head.settings, "BENCHMARK_CLUSTER": head.address}
        starts = ways_to_first_step(root, run, head.address, on_cluster)
        back = ways_back(root, run, head.address, on_cluster)
        cold = {name: way for name, way in starts.items() if name.endswith("its own")}
        warm = {name: way for name, way in starts.items() if name not in cold}
        return [
            Table("Command to first step, cold Ray", "s", "lower", OURS_COLD, measure(cold, options.rounds, warm_up)),
            Table("Command to first step, warm Ray", "s", "lower", OURS_WARM, measure(warm, options.rounds, warm_up)),
            Table("SIGKILL to the next finished step, on Ray", "s", "lower", OURS_BACK,
                  measure(back, options.rounds, 0),
                  ("all save every few steps; a worker is the process that Ray has started for a rank",)),
        ]  # fmt: skip


def train_line(run: Path, *more: str) -> list[str]:
    llmtrain = str(Path(sysconfig.get_path("scripts")) / "llmtrain")
    sizes = f"train.micro_batch_size={SHAPE.batch_size // 2}"
    return [llmtrain, "train", str(run), *TWO_RANKS, sizes, "launch.backend=ray", *more]


def plain_line(folder: Path, steps: int, fault_step: int = 0) -> list[str]:
    sizes = {"shape": SHAPE, "steps": steps, "fault_step": fault_step, "save_every": SAVE_EVERY}
    return [sys.executable, "-c", RAY_TRAIN_SCRIPT.format(**sizes), str(folder)]


def ways_to_first_step(root: Path, run: Path, address: str, on_cluster: Mapping[str, str]) -> dict[str, Measurement]:
    metrics, loss = root / "runs" / "benchmark" / "metrics.jsonl", root / "plain" / "loss"
    line, plain = train_line(run), plain_line(loss.parent, steps=1)
    return {
        OURS_COLD: lambda: seconds_to_output(line, metrics),
        "Ray Train, a Ray of its own": lambda: seconds_to_output(plain, loss),
        OURS_WARM: lambda: seconds_to_output([*line, f"launch.ray_address={address}"], metrics, on_cluster),
        "Ray Train, running cluster": lambda: seconds_to_output(plain, loss, on_cluster),
    }


def ways_back(root: Path, run: Path, address: str, on_cluster: Mapping[str, str]) -> dict[str, Measurement]:
    settings = (f"launch.ray_address={address}", f"train.steps={STEPS}", f"checkpoint.every_steps={SAVE_EVERY}")
    line = train_line(run, *settings, "launch.max_stalled_attempts=3")
    folder = root / "runs" / "benchmark"
    return {
        OURS_BACK: lambda: seconds_back(line, folder, on_cluster, lambda rank: rank),
        "llmtrain, worker killed": lambda: seconds_back(
            line, folder, on_cluster, lambda rank: psutil.Process(rank).parents()[1].pid
        ),
        "Ray Train, worker killed": lambda: plain_seconds_back(on_cluster),
    }


def seconds_back(line: list[str], run: Path, environ: Mapping[str, str], victim: Callable[[int], int]) -> float:
    """Kill what belongs to rank 1 some steps after the start; until the first step that the run then finishes."""
    metrics = run / "metrics.jsonl"
    shutil.rmtree(run, ignore_errors=True)
    process = subprocess.Popen(line, cwd=REPOSITORY, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(process, lambda: any(row["step"] >= FAULT_STEP for row in rows_of(metrics)))
    killed = time.time()
    rank = int((run / "logs" / "rank-00001.log").read_text().split("process ")[1].split()[0])
    os.kill(victim(rank), signal.SIGKILL)
    wait_for(process, lambda: any("resumed_from" in row for row in rows_of(metrics)))
    back = next(row["time"] for row in rows_of(metrics) if "resumed_from" in row)
    process.terminate()
    process.wait()
    return back - killed


def plain_seconds_back(environ: Mapping[str, str]) -> float:
    """What the script wrote down."""
    with tempfile.TemporaryDirectory() as folder:
        line = plain_line(Path(folder), FAULT_STEP + AFTER_FAULT, FAULT_STEP)
        done = subprocess.run(line, cwd=REPOSITORY, env=environ, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"Ray Train: {done.stderr[-2000:]}")
        killed, back = (float((Path(folder) / name).read_text()) for name in ("killed", "back"))
    return back - killed


def rows_of(metrics: Path) -> Iterable[dict]:
    """The whole rows that are there so far."""
    text = metrics.read_text("utf-8") if metrics.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def wait_for(process: subprocess.Popen, condition: Callable[[], bool]) -> None:
    while not condition():
        if process.poll() is not None:
            raise RuntimeError(f"ended with {process.returncode} too early")
        time.sleep(0.01)
