"""The recording of a run: its monitor with its trackers, its status, and a profiler where one is wanted."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from llmtrain.checkpoint.folders import CHECKPOINTS, checkpoint_steps, step_folder_name
from llmtrain.config.budget import Budget
from llmtrain.config.schema import RunConfig
from llmtrain.data.storage.remote import shown_path
from llmtrain.files import open_log
from llmtrain.observe.console import ConsoleTracker
from llmtrain.observe.machine import SystemMeter
from llmtrain.observe.monitor import Monitor, RunPlan, flops_per_sample, peak_flops, perplexity
from llmtrain.observe.trackers import build_trackers
from llmtrain.preflight.resolve import ResolvedRun
from llmtrain.runs.audit import StartedAttempt
from llmtrain.runs.folder import RunFolder
from llmtrain.runs.rank_logs import log_path
from llmtrain.train.state import TrainState
from llmtrain.values.label_metrics import label_metrics
from llmtrain.values.progress import DISTILL_LOSS, Phase, Row

SECONDS_BETWEEN_WRITES = 1.0


class ProgressTracker:
    """Writes the step of each row into the run folder's status, at most once a second. The worker writes the end.

    It is the first of a run's trackers: where the folder has another owner by now, the others write nothing either.
    """

    def __init__(self, folder: RunFolder, total_steps: int) -> None:
        self._folder = folder
        self._total_steps = total_steps
        self._written_at = -SECONDS_BETWEEN_WRITES

    def log(self, row: Row) -> None:
        """Raises RunFolderInUseError where the run folder was lost, as `flush` and `close` do."""
        self._folder.ensure_held()
        if time.monotonic() - self._written_at >= SECONDS_BETWEEN_WRITES:
            self._folder.write_status("running", row["step"], self._total_steps, "training")
            self._written_at = time.monotonic()

    def flush(self) -> None:
        """Nothing to wait for: a status is written at once."""
        self._folder.ensure_held()

    def close(self, status: str) -> None:
        """The worker writes the end."""
        self._folder.ensure_held()


def evaluation_metrics(
    config: RunConfig, valid_loss: float, num_tokens: int, counts: Sequence[float]
) -> dict[str, float]:
    """The metrics of an evaluation beside its loss, where there are others than tokens have anyway."""
    if config.distill is None:
        return label_metrics(config.model, counts)
    return {"perplexity": perplexity(valid_loss), DISTILL_LOSS: counts[0] / max(1, num_tokens)}


def build_monitor(
    resolved: ResolvedRun,
    folder: RunFolder | None,
    state: TrainState,
    device: torch.device,
    attempt: StartedAttempt,
    on_phase: Callable[[Phase, int], None],
) -> Monitor:
    """The monitor of a run from `state` on, recording into `folder`; without a folder it times and records nothing."""
    config = resolved.config
    last_step = Budget.of(config).last_step(state.seen)
    plan = RunPlan(
        last_step=last_step,
        start_step=state.step,
        start_tokens=state.tokens,
        log_every_steps=config.observe.log_every_steps,
        sources=source_names(config),
        flops_per_token=flops_per_sample(config.model, resolved.lengths, config.frozen) / config.data.seq_len,
        peak_flops=peak_of_run(config, device),
        attempt=attempt.number,
    )
    if folder is None:
        return Monitor(plan, on_phase=on_phase)
    path = log_path(folder.path, 0)
    path.parent.mkdir(exist_ok=True)
    log = open_log(path)  # launch/rank/worker.py has begun it
    console = ConsoleTracker(config.name, state.step, last_step, log=log)
    newest = partial(newest_checkpoint, folder.path)
    trackers = build_trackers(config, resolved.layout, folder.path, attempt, console, newest)
    progress = ProgressTracker(folder, last_step)
    return Monitor(plan, [progress, *trackers], console, on_phase=on_phase, sample=SystemMeter(device).sample)


MOST_SOURCE_COLUMNS = 100
"""With more sources than this, rows have no columns for each of them."""


def source_names(config: RunConfig) -> tuple[str, ...]:
    """The names of the sources' columns: their paths, numbered where one is named more than once."""
    paths = [shown_path(source.path) for source in config.data.train]
    if len(paths) > MOST_SOURCE_COLUMNS:
        return ()
    return tuple(path if paths.count(path) == 1 else f"{path} ({n})" for n, path in enumerate(paths, start=1))


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The folder of the newest checkpoint of a run, by its name."""
    checkpoints = run_dir / CHECKPOINTS
    return next((checkpoints / step_folder_name(step) for step in checkpoint_steps(checkpoints)), None)


def profiled(
    config: RunConfig, rank: int, on_phase: Callable[[Phase, int], None], say: Callable[[str], None]
) -> Callable[[Phase, int], None]:
    """The listener to a rank's phases: behind a profiler, where the configuration wants one on this rank."""
    wanted = config.observe.profile
    if wanted is None or rank not in wanted.ranks:
        return on_phase
    from llmtrain.observe.profile import PROFILES, Profiler  # imports torch.profiler

    stem = config.run_dir / PROFILES / f"rank-{rank:05d}"
    return Profiler(on_phase, wanted.steps, stem, say)


def peak_of_run(config: RunConfig, device: torch.device) -> float | None:
    """Operations per second of all devices at best. None where no peak is known: on a CPU, and for fp32."""
    if device.type != "cuda" or config.train.precision == "fp32":
        return None
    peak = peak_flops(torch.cuda.get_device_name(device))
    return peak * config.launch.num_workers if peak else None
