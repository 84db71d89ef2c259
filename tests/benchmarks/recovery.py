"""From the death of a rank to the next finished step, two ranks, beside torchrun restarting a plain DDP script."""

import json
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from llmtrain.checks.drill.single_faults import FAULT_STEP, SAVE_EVERY, STEPS
from tests.benchmarks.command import REPOSITORY, SHAPE, write_run
from tests.benchmarks.launch import TWO_RANKS
from tests.benchmarks.measuring import Measurement, Options, Table, measure

OURS = "llmtrain, torch, 2 ranks"
LONGEST_SECONDS = 60.0
KILLED = "rank killed in a step"

DDP_SCRIPT = """
from pathlib import Path
import os
import signal
import sys
import time
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tests.benchmarks.peer_models import PlainGPT, Shape, random_tokens
folder = Path(sys.argv[1])
dist.init_process_group("gloo")
shape = {shape}
torch.manual_seed(0)
model = DistributedDataParallel(PlainGPT(shape))
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
rows = shape.batch_size // dist.get_world_size()
first = 1
if (folder / "state.pt").exists():
    state = torch.load(folder / "state.pt")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    first = state["step"] + 1
for step in range(first, {steps} + 1):
    tokens = random_tokens(shape, step)[0][dist.get_rank() * rows :][:rows]
    if step == {fault_step} and dist.get_rank() == 1 and not (folder / "killed").exists():
        (folder / "killed").write_text(repr(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0 and first > 1 and not (folder / "back").exists():
        (folder / "back").write_text(repr(time.time()))
    if step % {save_every} == 0 and dist.get_rank() == 0:
        state = {{"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}}
        torch.save(state, folder / "new.pt")
        (folder / "new.pt").rename(folder / "state.pt")
dist.barrier()
os._exit(0)  # gloo's threads sometimes abort an orderly end, which is not what is measured
"""
"""A plain model on random tokens that saves and continues as a page of code does."""


def benchmark(options: Options) -> list[Table]:
    """Seconds from the SIGKILL of a rank until a step is finished again; both continue from the step saved before."""
    with tempfile.TemporaryDirectory() as folder:
        ways = ways_to_recover(Path(folder))
        if options.quick:
            del ways["torchrun, plain DDP script"]  # it may hang
        rows = measure(ways, options.rounds, warm_up=0)
    notes = (
        "torchrun looks every 0.1 s, its default; both save every few steps and lose two",
        f"a plain script that does not come back counts as {LONGEST_SECONDS:.0f} s; after some restarts it hangs",
    )
    return [Table("SIGKILL of a rank to the next finished step", "s", "lower", OURS, rows, notes)]


def ways_to_recover(root: Path) -> dict[str, Measurement]:
    """Each rank computes in one thread, everywhere."""
    scripts = Path(sysconfig.get_path("scripts"))
    run = str(write_run(root))
    drill = [str(scripts / "llmtrain"), "drill", run, *TWO_RANKS, "--only", KILLED, "--json"]
    drill.append(f"train.micro_batch_size={SHAPE.batch_size // 2}")
    torchrun = [str(scripts / "torchrun"), "--standalone", "--nproc-per-node=2", "--max-restarts=3", "--no-python"]
    sizes = {"shape": SHAPE, "steps": STEPS, "fault_step": FAULT_STEP, "save_every": SAVE_EVERY}
    script = [sys.executable, "-c", DDP_SCRIPT.format(**sizes)]  # as text: it finds the repository
    return {
        OURS: lambda: drilled(drill),
        "llmtrain, megatron, tensor 2": lambda: drilled([*drill, "engine.name=megatron", "parallel.tensor=2"]),
        "torchrun, plain DDP script": lambda: restarted([*torchrun, *script]),
    }


def drilled(line: list[str]) -> float:
    """What the drill measured."""
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)["back_seconds"]


def restarted(line: list[str]) -> float:
    """What the script wrote down; LONGEST_SECONDS where it is not done after that time, or ends without a step."""
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [*line, folder],
            cwd=REPOSITORY,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            process.wait(LONGEST_SECONDS)
        except subprocess.TimeoutExpired:
            # torchrun ends its ranks when it is told to, also those that hang.
            process.terminate()
            process.wait()
            return LONGEST_SECONDS
        if not (Path(folder) / "back").exists():
            return LONGEST_SECONDS
        killed, back = (float((Path(folder) / name).read_text()) for name in ("killed", "back"))
    return back - killed
