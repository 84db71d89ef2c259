"""From a configuration to the parts of a run: loader, engine, monitor, evaluation, checkpoints."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from llmtrain.checkpoint.manager import CHECKPOINTS, CheckpointManager
from llmtrain.checkpoint.reader import CheckpointReader, open_checkpoint
from llmtrain.config.rendering import to_yaml
from llmtrain.config.schema import RunConfig, SourceConfig
from llmtrain.data.loader import BatchLoader, build_stream
from llmtrain.data.tokenizer import find_tokenizer
from llmtrain.engines.torch_engine import TorchEngine
from llmtrain.errors import ConfigError
from llmtrain.observe.console import ConsoleTracker
from llmtrain.observe.environment import save_environment
from llmtrain.observe.monitor import Monitor, RunPlan
from llmtrain.observe.throughput import flops_per_token, peak_flops
from llmtrain.observe.trackers import METRICS_FILE, build_trackers
from llmtrain.train.evaluate import Evaluation
from llmtrain.train.loop import Run
from llmtrain.train.progress import ProgressTracker
from llmtrain.train.run_folder import RunFolder
from llmtrain.train.saving import Saving, restore
from llmtrain.train.state import TrainState

ENGINES = {"torch": TorchEngine}


@dataclass(frozen=True)
class Start:
    """Where a run begins: its folder, the checkpoint it continues (None: from nothing), and who manages the next ones."""

    manager: CheckpointManager
    checkpoint: CheckpointReader | None

    @property
    def step(self) -> int:
        return self.checkpoint.step if self.checkpoint and "train" in self.checkpoint.state else 0


def find_start(config: RunConfig, folder: RunFolder) -> Start:
    """Decide what the run continues from.

    `checkpoint.resume` is auto (the newest valid checkpoint), none (refused where the folder is used), or a path. A
    path inside this run goes back to it; one outside is where the run begins, until it has checkpoints of its own.
    Raises ConfigError and CheckpointError.
    """
    about = {"engine": config.engine.name, "world_size": 1, "precision": config.train.precision}
    manager = CheckpointManager(folder.path / CHECKPOINTS, config.checkpoint, to_yaml(config), about)
    resume = config.checkpoint.resume
    if resume == "none":
        if manager.latest_steps() or (folder.path / METRICS_FILE).exists():
            raise ConfigError(
                f"checkpoint.resume = none: {folder.path} holds an earlier run. "
                "Choose another name, remove the folder, or continue the run with checkpoint.resume=auto."
            )
        return Start(manager, None)
    inside = resume != "auto" and Path(resume).resolve().is_relative_to(folder.path.resolve())
    if resume == "auto" or (manager.latest_steps() and not inside):
        return Start(manager, manager.newest_valid())
    return Start(manager, open_checkpoint(Path(resume)))


def setup(config: RunConfig, folder: RunFolder, start: Start, device: torch.device) -> Run:
    """Build the parts of a run. The run folder is locked by this process and the vocabulary size known."""
    torch.set_float32_matmul_precision("highest")
    save_run_files(config, folder.path)
    engine = ENGINES[config.engine.name](config, device)
    state = restore(start.checkpoint, engine) if start.checkpoint else TrainState()
    monitor = build_monitor(config, folder, state, device)
    saving = Saving(start.manager, config.checkpoint.every_steps, config.total_steps, monitor.flush)
    evaluation = Evaluation(
        build_loader(config, config.data.valid) if config.data.valid else None,
        config.evaluate.every_steps,
        config.evaluate.steps,
    )
    loader = build_loader(config, config.data.train)
    return Run(loader, engine, monitor, evaluation, saving, state, config.total_steps, config.optim)


def build_loader(config: RunConfig, sources: tuple[SourceConfig, ...]) -> BatchLoader:
    stream = build_stream(sources, config.data, config.seed)
    return BatchLoader(stream, config.data, config.train.global_batch_size, config.train.micro_batch_size)


def build_monitor(config: RunConfig, folder: RunFolder, state: TrainState, device: torch.device) -> Monitor:
    """What records the run from `state` on."""
    plan = RunPlan(
        last_step=config.total_steps,
        start_step=state.step,
        start_tokens=state.tokens,
        log_every_steps=config.observe.log_every_steps,
        flops_per_token=flops_per_token(config.model, config.data.seq_len),
        peak_flops=peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None,
    )
    console = ConsoleTracker(config.name, state.step, config.total_steps)
    trackers = build_trackers(config, folder.path, state.step, console)
    return Monitor(plan, [*trackers, ProgressTracker(folder, config.total_steps)], console)


def save_run_files(config: RunConfig, path: Path) -> None:
    """The resolved configuration, the environment and the tokenizer: with them the folder explains itself."""
    (path / "config.yaml").write_text(to_yaml(config), "utf-8")
    save_environment(path)
    tokenizer = Path(config.data.tokenizer) if config.data.tokenizer else find_tokenizer(config.data.train[0].path)
    shutil.copyfile(tokenizer, path / f"tokenizer{tokenizer.suffix}")
