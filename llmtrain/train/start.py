"""From where a run begins: the checkpoint that it continues, on which all ranks agree."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.checkpoint.exchange import Exchange
from llmtrain.checkpoint.find import find_checkpoint
from llmtrain.checkpoint.folders import CHECKPOINTS
from llmtrain.checkpoint.manager import CheckpointManager, Reports
from llmtrain.checkpoint.origin import origin_of
from llmtrain.checkpoint.reader import CheckpointReader, open_checkpoint
from llmtrain.checkpoint.stored_state import require_state
from llmtrain.config.parameters import frozen_names
from llmtrain.config.reading.rendering import record_of
from llmtrain.config.schema import RunConfig
from llmtrain.data.loader import Window
from llmtrain.errors import ConfigError
from llmtrain.preflight.resolve import ResolvedRun
from llmtrain.preflight.resume_rules import (
    data_record,
    differences,
    evaluation_record,
    no_base,
    noted_changes,
    one_line,
    refusals,
    resume_target,
)
from llmtrain.runs.folder import RunFolder
from llmtrain.runs.metrics_file import METRICS_FILE
from llmtrain.train.rollback import newest_kept, skipped_windows
from llmtrain.train.saving import saved_state
from llmtrain.train.state import TrainState


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


def find_start(resolved: ResolvedRun, folder: RunFolder, ranks: Exchange | None = None) -> Start:
    """Decide what the run continues from. Where there are several ranks, rank 0 does.

    Only the disk counts, whatever status.json or metrics.jsonl say. `checkpoint.resume` is none (refused where the
    folder is used), or as `resume_target` says. Going back to an older checkpoint of this run, and what has changed
    since the checkpoint, is said on stderr. Raises ConfigError and CheckpointError.
    """
    manager = build_manager(resolved, ranks, folder)
    skipped = skipped_windows(folder.path)
    target = resume_target(resolved.config)
    if target is None:
        if manager.latest_steps() or (folder.path / METRICS_FILE).exists():
            raise ConfigError(
                f"checkpoint.resume = none: {folder.path} holds an earlier run. "
                "Choose another name, remove the folder, or continue the run with checkpoint.resume=auto."
            )
        rest_on_base(manager, None, resolved.config)
        return Start(manager, None, skipped, ranks)
    own = folder.path / CHECKPOINTS
    checkpoint = newest_kept(manager, skipped) if target == own else find_checkpoint(target)
    start = Start(manager, checkpoint, skipped, ranks)
    if start.checkpoint:
        require_state(start.checkpoint.path, start.checkpoint.state, start.checkpoint.about)
        require_continuity(resolved, folder, start.checkpoint)
    rest_on_base(manager, start.checkpoint, resolved.config)
    back = target.resolve().is_relative_to(own.resolve())
    later = [step for step in manager.latest_steps() if step > start.step] if back else []
    if later:
        text = f"going back to step {start.step} of {folder.path}: what it did up to step {later[0]} will be set aside"
        print(text, file=sys.stderr)
    return start


def rest_on_base(manager: CheckpointManager, checkpoint: CheckpointReader | None, config: RunConfig) -> None:
    """Let what a run saves name the checkpoint that has its frozen weights. Raises ConfigError where there is none."""
    frozen = frozen_names(config.model, config.optim.freeze)
    if frozen and checkpoint is None:
        raise ConfigError([no_base(config)])
    base = checkpoint.base_of(frozen) if checkpoint else None
    if base:
        manager.rest_on(base)


def require_continuity(resolved: ResolvedRun, folder: RunFolder, checkpoint: CheckpointReader) -> None:
    """Raise ConfigError where the run may not continue a checkpoint; say and record what has changed otherwise."""
    origin = origin_of(checkpoint.path, checkpoint.state, checkpoint.config_text, checkpoint.about)
    found = differences(origin, resolved.config, resolved.train)
    refused = refusals(found, resolved.config)
    if refused:
        raise ConfigError(refused)
    for item in found:
        place = {"checkpoint": str(checkpoint.path), "step": checkpoint.step}
        folder.record("changed", key=item.key, was=item.was, now=item.now, **place)
    said = one_line([*found, *noted_changes(origin, resolved.config)])
    if said:
        print(f"changed since {checkpoint.path}: {said}", file=sys.stderr)


def describe_start(start: Start) -> dict[str, Any]:
    """What the other ranks need to know of what rank 0 has decided, as JSON."""
    return {"checkpoint": str(start.checkpoint.path) if start.checkpoint else None, "skipped": start.skipped}


def join_start(resolved: ResolvedRun, said: Mapping[str, Any], ranks: Exchange) -> Start:
    """What rank 0 has decided and described. It has hashed the files: they are not hashed again."""
    reader = open_checkpoint(Path(said["checkpoint"]), verify=False) if said["checkpoint"] else None
    skipped = tuple((first, end) for first, end in said["skipped"])
    return Start(build_manager(resolved, ranks), reader, skipped, ranks)


def build_manager(resolved: ResolvedRun, ranks: Exchange | None, folder: RunFolder | None = None) -> CheckpointManager:
    """The manager of a rank; the one that holds the run folder reports, and writes only while it holds it."""
    config = resolved.config
    about = {
        "engine": config.engine.name,
        "world_size": config.launch.num_workers,
        "precision": config.train.precision,
        "data": data_record(config, resolved.train),
        "evaluated_on": evaluation_record(config, resolved.valid),
    }
    reports = Reports(record=folder.record, ensure_held=folder.ensure_held) if folder else Reports()
    return CheckpointManager(
        resolved.run_dir / CHECKPOINTS, config.checkpoint, record_of(config), about, reports, ranks
    )
