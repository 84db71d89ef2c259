"""From a configuration to the parts of a run: loader, engine, monitor, evaluation, checkpoints."""

import hashlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from llmtrain.checkpoint.exchange import Exchange
from llmtrain.checkpoint.folders import CHECKPOINTS, checkpoint_steps, step_folder_name
from llmtrain.checkpoint.manager import CheckpointManager, Reports
from llmtrain.checkpoint.origin import origin_of, read_origin
from llmtrain.checkpoint.reader import CheckpointReader, open_checkpoint
from llmtrain.checkpoint.stored_state import require_state
from llmtrain.config.budget import Budget
from llmtrain.config.engines import ENGINES
from llmtrain.config.reading.rendering import record_of
from llmtrain.config.schema import DataConfig, RunConfig, SourceConfig
from llmtrain.config.sequence_lengths import sample_lengths
from llmtrain.data.loader import BatchLoader, Window, build_stream
from llmtrain.data.objectives.word_starts import load_pieces
from llmtrain.data.row_config import Recipe
from llmtrain.data.storage.folders import fetch_config, open_folder, run_settings, run_tokenizer
from llmtrain.data.storage.manifest import LONGEST_TOKENIZER, Manifest
from llmtrain.data.stream import SampleStream
from llmtrain.data.token_roles import (
    SETTINGS_NAME,
    TokenRoles,
    TrainedTokens,
    read_settings,
    settings_text,
    settings_tokenizer,
)
from llmtrain.engines.tensor_norms import measuring
from llmtrain.errors import ConfigError, DataError
from llmtrain.files import open_log, read_bytes, replace_file, sealed_text
from llmtrain.infer.model import find_checkpoint
from llmtrain.observe.console import ConsoleTracker
from llmtrain.observe.environment import save_environment
from llmtrain.observe.monitor import Monitor, RunPlan
from llmtrain.observe.phases import Section
from llmtrain.observe.system import SystemMeter
from llmtrain.observe.throughput import flops_per_sample, peak_flops
from llmtrain.observe.trackers import build_trackers
from llmtrain.parallel.layout import plan_layout
from llmtrain.preflight.resume_rules import (
    data_record,
    differences,
    evaluation_record,
    noted_changes,
    one_line,
    refusals,
    resume_target,
)
from llmtrain.preflight.windows import source_uses
from llmtrain.runs.attempts import StartedAttempt, begin_attempt
from llmtrain.runs.folder import RunFolder
from llmtrain.runs.metrics_file import METRICS_FILE
from llmtrain.runs.rank_logs import log_path
from llmtrain.train.evaluate import Evaluation
from llmtrain.train.health import Health
from llmtrain.train.loop import Run
from llmtrain.train.rollback import Rollbacks, newest_kept, skipped_windows
from llmtrain.train.saving import Saving, restore, saved_state
from llmtrain.train.stall_limit import StallLimit
from llmtrain.train.state import TrainState
from llmtrain.train.status_tracker import ProgressTracker


@dataclass(frozen=True)
class Start:
    """Where a run begins: the checkpoint that it continues (None: from nothing), and who manages the next ones.

    `skipped` are the windows of data that the run passes over. `ranks` is absent where there is one.
    """

    manager: CheckpointManager
    checkpoint: CheckpointReader | None
    skipped: tuple[Window, ...] = ()
    ranks: Exchange | None = None

    @property
    def state(self) -> TrainState:
        return saved_state(self.checkpoint)

    @property
    def step(self) -> int:
        return self.checkpoint.step if self.checkpoint and "train" in self.checkpoint.state else 0


def engine_class(name: str) -> Any:
    """Import an engine."""
    row = ENGINES[name]
    return getattr(import_module(row.module), row.class_name)


def find_start(config: RunConfig, folder: RunFolder, ranks: Exchange | None = None) -> Start:
    """Decide what the run continues from. Where there are several ranks, rank 0 does.

    Only the disk counts, whatever status.json or metrics.jsonl say. `checkpoint.resume` is none (refused where the
    folder is used), or as `resume_target` says. Going back to an older checkpoint of this run, and what has changed
    since the checkpoint, is said on stderr. Raises ConfigError and CheckpointError.
    """
    manager = build_manager(config, folder.path, ranks, folder)
    skipped = skipped_windows(folder.path)
    target = resume_target(config)
    if target is None:
        if manager.latest_steps() or (folder.path / METRICS_FILE).exists():
            raise ConfigError(
                f"checkpoint.resume = none: {folder.path} holds an earlier run. "
                "Choose another name, remove the folder, or continue the run with checkpoint.resume=auto."
            )
        return Start(manager, None, skipped, ranks)
    own = folder.path / CHECKPOINTS
    checkpoint = newest_kept(manager, skipped) if target == own else find_checkpoint(target)
    start = Start(manager, checkpoint, skipped, ranks)
    if start.checkpoint:
        require_state(start.checkpoint.path, start.checkpoint.state, start.checkpoint.about)
        require_continuity(config, folder, start.checkpoint)
    back = target.resolve().is_relative_to(own.resolve())
    later = [step for step in manager.latest_steps() if step > start.step] if back else []
    if later:
        text = f"going back to step {start.step} of {folder.path}: what it did up to step {later[0]} will be set aside"
        print(text, file=sys.stderr)
    return start


def require_continuity(config: RunConfig, folder: RunFolder, checkpoint: CheckpointReader) -> None:
    """Raise ConfigError where the run may not continue a checkpoint; say and record what has changed otherwise."""
    origin = origin_of(checkpoint.path, checkpoint.state, checkpoint.config_text, checkpoint.about)
    found = differences(origin, config, read_manifests(config, config.data.train))
    refused = refusals(found, config)
    if refused:
        raise ConfigError(refused)
    for item in found:
        place = {"checkpoint": str(checkpoint.path), "step": checkpoint.step}
        folder.record("changed", key=item.key, was=item.was, now=item.now, **place)
    said = one_line([*found, *noted_changes(origin, config)])
    if said:
        print(f"changed since {checkpoint.path}: {said}", file=sys.stderr)


def describe_start(start: Start) -> dict[str, Any]:
    """What the other ranks need to know of what rank 0 has decided, as JSON."""
    return {"checkpoint": str(start.checkpoint.path) if start.checkpoint else None, "skipped": start.skipped}


def join_start(config: RunConfig, run_dir: Path, said: Mapping[str, Any], ranks: Exchange) -> Start:
    """What rank 0 has decided and described. It has hashed the files: they are not hashed again."""
    reader = open_checkpoint(Path(said["checkpoint"]), verify=False) if said["checkpoint"] else None
    skipped = tuple((first, end) for first, end in said["skipped"])
    return Start(build_manager(config, run_dir, ranks), reader, skipped, ranks)


def setup(
    config: RunConfig,
    folder: RunFolder | None,
    start: Start,
    device: torch.device,
    rank: int = 0,
    on_section: Callable[[Section, int], None] = lambda section, step: None,
) -> Run:
    """Build the parts of a run on one of its launch.num_workers ranks.

    Rank 0 holds the lock of the run folder and records the run; the others have no `folder`. The vocabulary size is
    known, and where there are several ranks, torch.distributed is initialized. `on_section` hears where this rank is.
    """
    torch.set_float32_matmul_precision("highest")
    attempt = StartedAttempt()
    if folder:
        folder.ensure_held()
        save_run_files(config, folder.path, start.checkpoint.path if start.checkpoint else None)
        data = [source.to_json() for source in source_uses(config)]
        attempt = begin_attempt(folder.path, start.step, config.launch.num_workers, data)
    engine = engine_class(config.engine.name)(config, device)
    state = restore(start.checkpoint, engine) if start.checkpoint else TrainState()
    engine = measuring(engine, config.model, config.observe.layer_norms_every_steps)
    # The monitor is made with whoever hears of sections, and tells what they have to say.
    on_section = profiled(config, rank, on_section, lambda text: (monitor.say if folder else tell_the_log)(text))
    monitor = build_monitor(config, folder, state, device, attempt, on_section)
    start.manager.reports.warn = monitor.say
    saving = Saving(start.manager, config.checkpoint.every_steps, monitor.flush)
    evaluation = Evaluation(
        build_loader(config, config.data.valid, rank, once=True) if config.data.valid else None,
        config.evaluate.every_steps,
        config.evaluate.steps,
        config.checkpoint.keep_best,
    )
    log = start.manager.reports.record if folder else lambda event, **facts: None
    report = partial(setattr, folder, "verdict") if folder else lambda verdict: None
    health = Health(config.health, config.optim.loss_scale.minimum, log, monitor.say, report)
    rollbacks = Rollbacks(config.health, start.manager, folder.path if folder else None, start.ranks, log, monitor.say)
    loader = build_loader(config, config.data.train, rank).skipping(start.skipped)
    limit, budget = StallLimit.of(config), Budget.of(config)
    return Run(loader, engine, monitor, evaluation, saving, health, rollbacks, limit, state, budget, config.optim)


def build_manager(
    config: RunConfig, run_dir: Path, ranks: Exchange | None, folder: RunFolder | None = None
) -> CheckpointManager:
    """The manager of a rank; the one that holds the run folder reports, and writes only while it holds it."""
    about = {
        "engine": config.engine.name,
        "world_size": config.launch.num_workers,
        "precision": config.train.precision,
        "data": data_record(config, read_manifests(config, config.data.train)),
        "evaluated_on": evaluation_record(config, read_manifests(config, config.data.valid)),
    }
    reports = Reports(record=folder.record, ensure_held=folder.ensure_held) if folder else Reports()
    return CheckpointManager(run_dir / CHECKPOINTS, config.checkpoint, record_of(config), about, reports, ranks)


def read_manifests(config: RunConfig, sources: tuple[SourceConfig, ...]) -> list[Manifest]:
    """Those of data.train or data.valid, in its order. Raises DataError."""
    return [open_folder(source.path, fetch_config(config.data)).read_manifest() for source in sources]


def build_loader(
    config: RunConfig, sources: tuple[SourceConfig, ...], rank: int = 0, once: bool = False
) -> BatchLoader:
    """The micro-batches of a rank: those of its place on the data axis. With `once`, data that ends is followed by
    samples without targets."""
    stream = build_stream(sources, config.data, config.seed, config.run_dir, once)
    layout = plan_layout(config.parallel, config.launch.num_workers)
    sizes = (config.train.global_batch_size, config.train.micro_batch_size)
    return BatchLoader(stream, build_recipe(config, stream), *sizes, layout.coordinates(rank).data, layout.data)


def build_recipe(config: RunConfig, stream: SampleStream) -> Recipe:
    """What rows are made with; special tokens are filled in already. Raises as `run_tokenizer` and `load_pieces` do."""
    pieces = None
    if config.data.objective == "masked":
        pieces = load_pieces(run_tokenizer(config.data, _first_manifest(config.data)))
    return Recipe(config.data, config.seed, stream.eos_id, config.model.family, pieces, stream.bos_ids)


def _first_manifest(data: DataConfig) -> Manifest:
    """That of the source whose tokenizer is the run's."""
    return open_folder(data.train[0].path, fetch_config(data)).read_manifest()


def build_monitor(
    config: RunConfig,
    folder: RunFolder | None,
    state: TrainState,
    device: torch.device,
    attempt: StartedAttempt,
    on_section: Callable[[Section, int], None],
) -> Monitor:
    """What records the run from `state` on, into `folder`; without a folder it times and records nothing."""
    last_step = Budget.of(config).last_step(state.seen)
    plan = RunPlan(
        last_step=last_step,
        start_step=state.step,
        start_tokens=state.tokens,
        log_every_steps=config.observe.log_every_steps,
        tokens_per_step=config.train.global_batch_size * config.data.seq_len,
        flops_per_token=flops_per_sample(config.model, sample_lengths(config.model.family, config.data))
        / config.data.seq_len,
        peak_flops=peak_of_run(config, device),
        attempt=attempt.number,
    )
    if folder is None:
        return Monitor(plan, on_section=on_section)
    path = log_path(folder.path, 0)
    path.parent.mkdir(exist_ok=True)
    log = open_log(path)  # launch/rank/log.py has begun it
    console = ConsoleTracker(config.name, state.step, last_step, log=log)
    trackers = build_trackers(config, folder.path, attempt, console, partial(newest_checkpoint, folder.path))
    progress = ProgressTracker(folder, last_step)
    return Monitor(plan, [progress, *trackers], console, on_section=on_section, sample=SystemMeter(device).sample)


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The folder of the newest checkpoint of a run, by its name."""
    checkpoints = run_dir / CHECKPOINTS
    return next((checkpoints / step_folder_name(step) for step in checkpoint_steps(checkpoints)), None)


def profiled(
    config: RunConfig, rank: int, on_section: Callable[[Section, int], None], say: Callable[[str], None]
) -> Callable[[Section, int], None]:
    """Who hears of a rank's sections: behind a profiler, where the configuration wants one on this rank."""
    wanted = config.observe.profile
    if wanted is None or rank not in wanted.ranks:
        return on_section
    from llmtrain.observe.profile import PROFILES, Profiler  # imports torch.profiler

    stem = config.run_dir / PROFILES / f"rank-{rank:05d}"
    return Profiler(on_section, wanted.steps, stem, say)


def tell_the_log(text: str) -> None:
    """What a rank that records nothing prints is in its log."""
    print(text, file=sys.stderr)


def peak_of_run(config: RunConfig, device: torch.device) -> float | None:
    """Operations per second of all devices at best. None where no peak is known: on a CPU, and for fp32."""
    if device.type != "cuda" or config.train.precision == "fp32":
        return None
    peak = peak_flops(torch.cuda.get_device_name(device))
    return peak * config.launch.num_workers if peak else None


def save_run_files(config: RunConfig, path: Path, checkpoint: Path | None = None) -> None:
    """The resolved configuration, the environment and the tokenizer: with them the folder explains itself.

    `checkpoint` is the one that the run continues. What is known of the tokenizer beside its file comes from the data,
    else from there.
    """
    manifest = _first_manifest(config.data)
    tokenizer = run_tokenizer(config.data, manifest)
    content = read_bytes(tokenizer, LONGEST_TOKENIZER)
    if hashlib.sha256(content).hexdigest() != manifest.tokenizer_sha256:
        raise DataError(f"{tokenizer}: was changed while it was read. See who writes there, then start again.")
    roles = trained_roles(config.data, manifest, checkpoint)
    if roles is None and tokenizer.suffix == ".json":
        roles = TokenRoles().as_trained(manifest.eos_id, manifest.bos_ids)
    # Nothing is written before all that it is made of was found whole: what the folder has stays good.
    replace_file(path / "config.yaml", sealed_text(record_of(config)).encode())
    save_environment(path)
    replace_file(path / f"tokenizer{tokenizer.suffix}", content)
    if roles is None:
        (path / SETTINGS_NAME).unlink(missing_ok=True)
    else:
        replace_file(path / SETTINGS_NAME, settings_text(roles, manifest.tokenizer_sha256).encode())


def trained_roles(data: DataConfig, manifest: Manifest, checkpoint: Path | None) -> TokenRoles | None:
    """What is known of a run's tokenizer, with the end and begin that its documents have; None where nothing is.

    Raises DataError where a file that says it is damaged.
    """
    settings, sha256 = run_settings(data, manifest), manifest.tokenizer_sha256
    roles = read_settings(settings, sha256, manifest.vocab_size) if settings else None
    if checkpoint is not None:
        before = checkpoint.absolute().parent.parent / SETTINGS_NAME
        if os.path.lexists(before):
            found = read_settings(before, None, manifest.vocab_size)
            if settings_tokenizer(before) == sha256 or sha256 in found.equal_sha256:
                roles = roles.with_model_of(found) if roles else found
        elif TrainedTokens.of(read_origin(checkpoint).about).has_settings:
            raise DataError(f"{before}: missing, and there was one. Copy it there again: it says what the model needs.")
    return None if roles is None else roles.as_trained(manifest.eos_id, manifest.bos_ids)
