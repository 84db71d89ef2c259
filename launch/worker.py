"""One rank of a run, the same in every launcher: threads, device, run folder, training, exit code."""

import os
from pathlib import Path

import torch

from launch.stop import StopSignal
from llmtrain.config.schema import LaunchConfig, RunConfig
from llmtrain.errors import EXIT_PREEMPTED, ConfigError
from llmtrain.train.loop import train
from llmtrain.train.preflight import with_vocab_size
from llmtrain.train.run_folder import RunFolder
from llmtrain.train.setup import find_start, setup


def run_worker(config: RunConfig) -> int:
    """Train, or continue, the run; returns the exit code."""
    config = with_vocab_size(config)
    torch.set_num_threads(num_threads(config.launch))
    device = choose_device(config.launch)
    with RunFolder(Path(config.output_dir) / config.name) as folder, StopSignal() as stop:
        start = find_start(config, folder)
        if start.step >= config.total_steps:
            print(f"{folder.path}: already done, all {config.total_steps} steps. Raise train.steps to go on.")
            folder.write_status("done", start.step, config.total_steps, "finished before")
            return 0
        folder.write_status("running", start.step, config.total_steps, "starting")
        run = None
        try:
            run = setup(config, folder, start, device)
            status, state = train(run, lambda: stop.requested)
        except BaseException as error:
            if run:
                run.monitor.close("failed")
            folder.write_status("failed", start.step, config.total_steps, f"{type(error).__name__}: {error}")
            raise
        run.monitor.close(status)
        message = "" if status == "done" else "told to stop; the same command continues"
        folder.write_status(status, state.step, config.total_steps, message)
        return 0 if status == "done" else EXIT_PREEMPTED


def num_threads(config: LaunchConfig) -> int:
    """CPU threads of one rank: as configured, or the usable cores shared among the ranks."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return config.threads_per_worker or max(1, cores // config.num_workers)


def choose_device(config: LaunchConfig) -> torch.device:
    """The device of this rank. Raises ConfigError where cuda is asked for and absent."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("launch.device = cuda: PyTorch finds no GPU here. Set launch.device=cpu, or check `nvidia-smi`.")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
