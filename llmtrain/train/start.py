"""From where a run begins, on which all ranks agree, and what it writes into its folder before its first step."""

import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.checkpoint.agreement import RankStore
from llmtrain.checkpoint.find import find_checkpoint
from llmtrain.checkpoint.folders import BASE, BEST_BY, CHECKPOINTS
from llmtrain.checkpoint.manager import CheckpointManager, Reports
from llmtrain.checkpoint.origin import origin_of, read_origin, require_state
from llmtrain.checkpoint.reader import CheckpointReader, open_checkpoint
from llmtrain.config.parameters import declare_parameters, is_of_label_head
from llmtrain.config.reading.rendering import record_of
from llmtrain.config.schema import RunConfig
from llmtrain.data.loader import Window
from llmtrain.data.storage.folders import run_settings
from llmtrain.data.storage.manifest import LONGEST_TOKENIZER
from llmtrain.data.token_roles import SETTINGS_NAME, TrainedTokens, read_settings, settings_text, settings_tokenizer
from llmtrain.errors import ConfigError, DataError
from llmtrain.files import read_bytes, replace_file, sealed_text
from llmtrain.observe.machine import save_environment
from llmtrain.preflight.beginning import begins_at_base, checkpoints_of, resume_target
from llmtrain.preflight.data_identity import data_record, evaluation_record
from llmtrain.preflight.differences import differences, noted_changes
from llmtrain.preflight.resolve import ResolvedRun
from llmtrain.preflight.resume_rules import no_base, one_line, refusals
from llmtrain.preflight.source_use import source_uses, use_notes
from llmtrain.runs.audit import StartedAttempt, begin_attempt, skipped_windows
from llmtrain.runs.folder import RunFolder
from llmtrain.runs.metrics_file import METRICS_FILE
from llmtrain.train.rollback import newest_kept
from llmtrain.train.state import TrainState, saved_state
from llmtrain.values.tokenizer import TokenRoles

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """The start of a run: the checkpoint that it continues (None: from nothing), and the manager of the next ones.

    `at_base`: of the checkpoint only the weights are taken. `skipped` are the windows of data that the run passes over.
    `ranks` is absent where there is one. `teacher` has the weights of a distillation's teacher.
    """

    manager: CheckpointManager
    checkpoint: CheckpointReader | None
    skipped: tuple[Window, ...] = ()
    ranks: RankStore | None = None
    at_base: bool = False
    teacher: CheckpointReader | None = None

    @property
    def state(self) -> TrainState:
        return saved_state(None if self.at_base else self.checkpoint)

    @property
    def step(self) -> int:
        if self.checkpoint is None or self.at_base or "train" not in self.checkpoint.state:
            return 0
        return self.checkpoint.step


def find_start(resolved: ResolvedRun, folder: RunFolder, ranks: RankStore | None = None) -> Start:
    """Decide what the run continues from. Where there are several ranks, rank 0 does.

    Only the disk counts, whatever status.json or metrics.jsonl say. `checkpoint.resume` is none (refused where the
    folder is used), or as `resume_target` says. Going back to an older checkpoint of this run, and what has changed
    since the checkpoint, is said on stderr. Raises ConfigError and CheckpointError.
    """
    manager = build_manager(resolved, ranks, folder)
    skipped = skipped_windows(folder.path)
    target, at_base = resume_target(resolved.config), begins_at_base(resolved.config)
    is_used = bool(manager.latest_steps()) or (folder.path / METRICS_FILE).exists()
    if resolved.config.checkpoint.resume == "none" and is_used:
        raise ConfigError(
            f"checkpoint.resume = none: {folder.path} holds an earlier run. "
            "Choose another name, remove the folder, or continue the run with checkpoint.resume=auto."
        )
    teacher = find_teacher(manager, resolved.config)
    if target is None:
        rest_on_base(manager, None, resolved.config)
        return Start(manager, None, skipped, ranks, teacher=teacher)
    # Own checkpoints that a rollback left are not the newest, even if the run was killed before it set them aside.
    own = folder.path / CHECKPOINTS
    checkpoint = newest_kept(manager, skipped) if target == own else find_checkpoint(target, (), manager.moved_base)
    start = Start(manager, checkpoint, skipped, ranks, at_base, teacher)
    if start.checkpoint:
        # First: the comparison relies on a position that is one.
        if not at_base:
            require_state(start.checkpoint.path, start.checkpoint.state, start.checkpoint.about)
        require_continuity(resolved, folder, start.checkpoint)
        manager.descend_from(start.checkpoint)
    rest_on_base(manager, start.checkpoint, resolved.config)
    back = target.resolve().is_relative_to(own.resolve())
    later = [step for step in manager.latest_steps() if step > start.step] if back else []
    if later:
        text = f"going back to step {start.step} of {folder.path}: what it did up to step {later[0]} will be set aside"
        _logger.info(text)
    return start


def find_teacher(manager: CheckpointManager, config: RunConfig) -> CheckpointReader | None:
    """The teacher's newest checkpoint, every file hashed; what the run saves names it."""
    if config.distill is None:
        return None
    teacher = find_checkpoint(checkpoints_of(Path(config.distill.teacher)))
    manager.learn_from(teacher.identity)
    return teacher


def rest_on_base(manager: CheckpointManager, checkpoint: CheckpointReader | None, config: RunConfig) -> None:
    """Let what a run saves name the checkpoint that has its frozen weights. Raises ConfigError where there is none."""
    frozen = [name for name in declare_parameters(config.model) if name in config.frozen]
    if frozen and checkpoint is None:
        raise ConfigError([no_base(config)])
    base = checkpoint.base_of(frozen) if checkpoint else None
    if base:
        manager.rest_on(base)


def require_continuity(resolved: ResolvedRun, folder: RunFolder, checkpoint: CheckpointReader) -> None:
    """Raise ConfigError where the run may not continue a checkpoint; say and record what has changed otherwise."""
    state = {} if begins_at_base(resolved.config) else checkpoint.state
    origin = origin_of(checkpoint.path, state, checkpoint.config_text, checkpoint.about)
    found = differences(origin, resolved.config, resolved.train)
    refused = refusals(found, resolved.config)
    if refused:
        raise ConfigError(refused)
    for item in found:
        place = {"checkpoint": str(checkpoint.path), "step": checkpoint.step}
        folder.record("changed", key=item.key, was=item.was, now=item.now, **place)
    if base := checkpoint.base_moved_to:
        was = checkpoint.about[BASE]["path"]
        folder.record("changed", key="finetune.base", was=was, now=str(base), step=checkpoint.step)
        _logger.info("the base of %s, %s, lies in %s now: it is the same, by its hash", checkpoint.path, was, base)
    said = one_line([*found, *noted_changes(origin, resolved.config)])
    if said:
        _logger.info("changed since %s: %s", checkpoint.path, said)
    if text := new_head_text(checkpoint, resolved.config):
        _logger.info(text)


def new_head_text(checkpoint: CheckpointReader, config: RunConfig) -> str | None:
    """The sentence that a run has a head for labels that its base has not, and what of the base it leaves out."""
    declared, held = declare_parameters(config.model), {info.name for info in checkpoint.tensors()}
    new = [name for name in declared if is_of_label_head(name) and name not in held]
    if not new:
        return None
    gone = sorted(held - declared.keys())
    left = f"; {', '.join(gone)}: of its head for tokens, left out" if gone else ""
    return f"{checkpoint.path} has no {', '.join(new)}: drawn by the seed{left}"


def describe_start(start: Start) -> dict[str, Any]:
    """The decision of rank 0 for the other ranks, as JSON."""
    path = str(start.checkpoint.path) if start.checkpoint else None
    # The path that rank 0 has found: a teacher that still trains may have a newer one by now.
    teacher = str(start.teacher.path) if start.teacher else None
    return {"checkpoint": path, "skipped": start.skipped, "at_base": start.at_base, "teacher": teacher}


def join_start(resolved: ResolvedRun, said: Mapping[str, Any], ranks: RankStore) -> Start:
    """The start that rank 0 has decided and described. It has hashed the files: they are not hashed again."""
    manager = build_manager(resolved, ranks)
    reader = manager.open(Path(said["checkpoint"])) if said["checkpoint"] else None
    teacher = open_checkpoint(Path(said["teacher"]), verify=False) if said["teacher"] else None
    skipped = tuple((first, end) for first, end in said["skipped"])
    return Start(manager, reader, skipped, ranks, said["at_base"], teacher)


def build_manager(resolved: ResolvedRun, ranks: RankStore | None, folder: RunFolder | None = None) -> CheckpointManager:
    """The manager of a rank; the one that holds the run folder reports, and writes only while it holds it."""
    config = resolved.config
    about = {
        "engine": config.engine.name,
        "world_size": config.launch.num_workers,
        "precision": config.train.precision,
        "data": data_record(config, resolved.train),
        "evaluated_on": evaluation_record(config, resolved.valid),
        BEST_BY: config.evaluate.metric,
    }
    reports = Reports(record=folder.record, ensure_held=folder.ensure_held) if folder else Reports()
    checkpoints = resolved.run_dir / CHECKPOINTS
    manager = CheckpointManager(checkpoints, config.checkpoint, record_of(config), about, reports, ranks)
    if config.finetune is not None and config.finetune.base is not None:
        manager.moved_base = Path(config.finetune.base)
    return manager


def record_start(resolved: ResolvedRun, folder: RunFolder, start: Start) -> StartedAttempt:
    """Write the files of a run, and that an attempt begins. Raises RunFolderInUseError where the folder is not held."""
    folder.ensure_held()  # a run that waited long for its ranks may have lost its folder meanwhile
    save_run_files(resolved, folder.path, start.checkpoint.path if start.checkpoint else None)
    uses = source_uses(resolved)
    for note in use_notes(uses):
        _logger.info(note)
    data = [source.to_json() for source in uses]
    return begin_attempt(folder.path, start.step, resolved.config.launch.num_workers, data)


def save_run_files(resolved: ResolvedRun, path: Path, checkpoint: Path | None = None) -> None:
    """The resolved configuration, the environment and the tokenizer: with them the folder explains itself.

    `checkpoint` is the one that the run continues. What is known of the tokenizer beside its file comes from the data,
    else from there.
    """
    config, manifest, tokenizer = resolved.config, resolved.train[0], resolved.tokenizer
    content = read_bytes(tokenizer, LONGEST_TOKENIZER)
    if hashlib.sha256(content).hexdigest() != manifest.tokenizer_sha256:
        raise DataError(f"{tokenizer}: was changed while it was read. See who writes there, then start again.")
    roles = run_roles(resolved, checkpoint)
    # Nothing is written before all that it is made of was found whole: what the folder has stays good.
    replace_file(path / "config.yaml", sealed_text(record_of(config)).encode())
    save_environment(path)
    replace_file(path / f"tokenizer{tokenizer.suffix}", content)
    if roles is None:
        (path / SETTINGS_NAME).unlink(missing_ok=True)
    else:
        replace_file(path / SETTINGS_NAME, settings_text(roles, manifest.tokenizer_sha256).encode())


def run_roles(resolved: ResolvedRun, checkpoint: Path | None) -> TokenRoles | None:
    """The roles of a run's tokens, with the end and begin that its documents have; None where nothing names them.

    `checkpoint` is the one that the run continues. Raises DataError where a file that says it is damaged.
    """
    manifest = resolved.train[0]
    settings, sha256 = run_settings(resolved.config.data, manifest), manifest.tokenizer_sha256
    roles = read_settings(settings, sha256, manifest.vocab_size) if settings else None
    if checkpoint is not None:
        before = checkpoint.absolute().parent.parent / SETTINGS_NAME
        if os.path.lexists(before):
            found = read_settings(before, None, manifest.vocab_size)
            if settings_tokenizer(before) == sha256 or sha256 in found.equal_sha256:
                roles = roles.with_model_of(found) if roles else found
        elif TrainedTokens.of(read_origin(checkpoint).about).has_settings:
            raise DataError(f"{before}: missing, and there was one. Copy it there again: it says what the model needs.")
    if roles is None and resolved.tokenizer.suffix == ".json":
        roles = TokenRoles()
    return None if roles is None else roles.as_trained(manifest.eos_id, manifest.bos_ids)
