"""From command to the end of the first step with two ranks on this machine, beside torchrun with a plain DDP script."""

import sys
import sysconfig
import tempfile
from pathlib import Path

from tests.benchmarks.command import NO_TRACKERS, SHAPE, seconds_to_output, write_run
from tests.benchmarks.measuring import Measurement, Options, Table, measure

OURS = "llmtrain train, torch, 2 ranks"
TWO_RANKS = ("launch.num_workers=2", "launch.device=cpu", *NO_TRACKERS)

DDP_SCRIPT = """
from pathlib import Path
import os
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tests.benchmarks.peer_models import PlainGPT, Shape, random_tokens
dist.init_process_group("gloo")
shape = {shape}
torch.manual_seed(0)
model = DistributedDataParallel(PlainGPT(shape))
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
rows = shape.batch_size // dist.get_world_size()
tokens = random_tokens(shape, 1)[0][dist.get_rank() * rows :][:rows]
loss = model(tokens[:, :-1], tokens[:, 1:])
loss.backward()
optimizer.step()
if dist.get_rank() == 0:
    Path(sys.argv[1]).write_text(str(loss.item()))
dist.barrier()
os._exit(0)  # gloo's threads sometimes abort an orderly end, which is not what is measured
"""
"""One step of a plain model on random tokens, its half on each rank."""


def benchmark(options: Options) -> list[Table]:
    """Seconds of wall time; Python's own caches are warm after the unrecorded round."""
    with tempfile.TemporaryDirectory() as folder:
        ways = ways_to_first_step(Path(folder))
        if options.quick:
            del ways["llmtrain under torchrun, torch"]
        rows = measure(ways, options.rounds, warm_up=0 if options.quick else 1)
    note = "llmtrain also reads configuration and shards and records the step in its run folder; the script does not"
    return [Table("Command to first step with 2 ranks", "s", "lower", OURS, rows, (note,))]


def ways_to_first_step(root: Path) -> dict[str, Measurement]:
    """Each rank computes in one thread, everywhere."""
    scripts = Path(sysconfig.get_path("scripts"))
    llmtrain, torchrun = str(scripts / "llmtrain"), str(scripts / "torchrun")
    torchrun_two = [torchrun, "--standalone", "--nproc-per-node=2", "--no-python"]
    train = ["train", str(write_run(root)), *TWO_RANKS, f"train.micro_batch_size={SHAPE.batch_size // 2}"]
    metrics = root / "runs" / "benchmark" / "metrics.jsonl"
    loss = root / "plain" / "loss"
    script = [sys.executable, "-c", DDP_SCRIPT.format(shape=SHAPE), str(loss)]  # as text: it finds the repository
    return {
        OURS: lambda: seconds_to_output([llmtrain, *train], metrics),
        "llmtrain train, megatron, tensor 2": lambda: seconds_to_output(
            [llmtrain, *train, "engine.name=megatron", "parallel.tensor=2"], metrics
        ),
        "llmtrain under torchrun, torch": lambda: seconds_to_output([*torchrun_two, llmtrain, *train], metrics),
        "torchrun, plain DDP script": lambda: seconds_to_output([*torchrun_two, *script], loss),
    }
