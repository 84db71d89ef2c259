"""The checkpoints of a run: when they are written behind training, which are kept, which one a run continues from."""

import logging
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llmtrain.checkpoint.exchange import Exchange
from llmtrain.checkpoint.folders import checkpoint_steps, step_folder_name
from llmtrain.checkpoint.fragments import Fragment
from llmtrain.checkpoint.host_copy import HostCopy
from llmtrain.checkpoint.manifest import (
    CheckpointUnusableError,
    ManifestPart,
    load_manifest,
    writing_folder_name,
)
from llmtrain.checkpoint.reader import CheckpointReader, open_checkpoint
from llmtrain.checkpoint.writer import (
    Contents,
    free_name,
    publish,
    recover,
    remove_checkpoint,
    start_checkpoint,
    sync_folder,
    write_rank_files,
)
from llmtrain.config.schema import CheckpointConfig
from llmtrain.errors import CheckpointError

_logger = logging.getLogger(__name__)

FAILED = "failed: "
"""Begins what a rank says in place of its part of the manifest when it could not write its files."""


def find_newest_valid(
    checkpoints: Path, warn: Callable[[str], object]
) -> tuple[CheckpointReader | None, list[tuple[Path, CheckpointError]]]:
    """The newest checkpoint that is whole, and the damaged ones that were passed over. Changes nothing.

    None only where there is no checkpoint at all. Raises CheckpointError where there are some and none is valid: a
    run must not start again from nothing by itself. CheckpointUnusableError (a newer format, no permission) is
    raised at once: such a checkpoint is not damaged.
    """
    damaged: list[tuple[Path, CheckpointError]] = []
    for step in checkpoint_steps(checkpoints):
        path = checkpoints / step_folder_name(step)
        try:
            return open_checkpoint(path), damaged
        except CheckpointUnusableError:
            raise
        except CheckpointError as error:
            warn(f"{error}\nIt is passed over for an older one.")
            damaged.append((path, error))
    if damaged:
        raise CheckpointError(
            f"{checkpoints}: none of the {len(damaged)} checkpoints is valid. The newest: {damaged[0][1]}\n"
            "Remove the folder to train again from the beginning."
        )
    return None, []


def steps_to_remove(metrics: Mapping[int, float | None], settings: CheckpointConfig) -> list[int]:
    """Which checkpoints to delete, oldest first.

    Kept are the newest `keep`, every multiple of `keep_every_steps`, and with `keep_best` the one with the lowest
    metric (of equal ones the oldest). `metrics` holds all that exist, None where a checkpoint has no metric.
    """
    kept = set(sorted(metrics)[-settings.keep :])
    if settings.keep_every_steps:
        kept |= {step for step in metrics if step % settings.keep_every_steps == 0}
    measured = [(metric, step) for step, metric in metrics.items() if metric is not None]
    if settings.keep_best and measured:
        kept.add(min(measured)[1])
    return sorted(metrics.keys() - kept)


class CheckpointManager:
    """Saves and finds the checkpoints of one run.

    `folder` is the run's `checkpoints` folder. Make one only while holding the run folder's lock: it removes what
    killed saves left behind. `about` says where checkpoints come from (layout, engine) and goes into each manifest.
    Where several ranks hold the state, each has a manager with `ranks`; all save the same steps, in the same order.
    Rank 0, which holds the lock, publishes what all have written.
    """

    def __init__(
        self,
        folder: Path,
        settings: CheckpointConfig,
        config_text: str,
        about: Mapping[str, Any],
        warn: Callable[[str], object] = _logger.warning,
        ranks: Exchange | None = None,
    ) -> None:
        self._ranks = ranks
        self._num_saves = 0
        self._folder = Path(folder)
        self._settings = settings
        self._config_text = config_text
        self._about = dict(about)
        self._warn = warn
        self._host_copy = HostCopy()
        self._writer: ThreadPoolExecutor | None = None
        self._running: Future[None] | None = None
        self._metrics: dict[int, float | None] = {}
        if ranks is None or ranks.rank == 0:
            recover(self._folder)

    def latest_steps(self) -> list[int]:
        """Steps of the checkpoints on the disk, newest first."""
        return checkpoint_steps(self._folder)

    def newest_valid(self) -> CheckpointReader | None:
        """The newest checkpoint that is whole, every file hashed; None where the run has none.

        Damaged newer ones are renamed to `damaged-step-...` and reported, so that nothing takes them for newest
        again. Raises as `find_newest_valid` does, and then renames nothing.
        """
        reader, damaged = find_newest_valid(self._folder, self._warn)
        for path, _ in damaged:
            self._set_aside(path, "damaged")
        return reader

    def save(
        self,
        step: int,
        fragments: Iterable[Fragment],
        state: dict[str, Any],
        before_publish: Callable[[], object],
        metric: float | None = None,
    ) -> None:
        """Write the checkpoint of a step; with `async_save` it returns once the state is copied.

        Waits for the save before and raises that one's error: two never run at once. `before_publish` runs right
        before the checkpoint becomes visible, with `async_save` in the writer's thread. `metric` is the validation
        loss that `keep_best` goes by. Raises CheckpointError where the file system does not take it; nothing is
        left of it then, and the next save may succeed.
        """
        self.finish()
        best_by = metric if metric is not None and math.isfinite(metric) else None
        contents = Contents(step, state, self._config_text, {**self._about, "metric": best_by})
        if not self._settings.async_save:
            self._write(contents, fragments, before_publish)
            return
        copies = self._host_copy.take(fragments)
        if self._writer is None:
            self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._running = self._writer.submit(self._write, contents, copies, before_publish)

    def finish(self) -> None:
        """Return once nothing is being written. Raises the error of a save that ran behind training."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def _write(self, contents: Contents, fragments: Iterable[Fragment], before_publish: Callable[[], object]) -> None:
        self._num_saves += 1
        if self._ranks is not None and self._ranks.rank > 0:
            self._write_part(self._ranks, contents.step, list(fragments))
            return
        writing = start_checkpoint(self._folder, contents.step)
        try:
            if self._ranks is not None:
                self._ranks.say(f"save {self._num_saves}: folder", writing.name)
            part = write_rank_files(writing, 0, fragments)
            publish(writing, [part, *self._other_parts()], contents, before_publish)
        except BaseException:
            shutil.rmtree(writing, ignore_errors=True)
            raise
        self._metrics[contents.step] = contents.about["metric"]
        try:
            self._set_aside_later_than(contents.step)
            self._remove_old()
        except OSError as error:
            self._warn(f"{error.filename or self._folder}: an old checkpoint could not be removed: {error.strerror}")

    def _write_part(self, ranks: Exchange, step: int, fragments: list[Fragment]) -> None:
        """Write what this rank holds, once rank 0 has made the folder, and tell rank 0 what that is."""
        ranks.hear(f"save {self._num_saves}: folder")
        key = f"save {self._num_saves}: part {ranks.rank}"
        if not fragments:
            ranks.say(key, ManifestPart(files={}, tensors={}).model_dump_json())
            return
        try:
            part = write_rank_files(self._folder / writing_folder_name(step), ranks.rank, fragments)
        except CheckpointError as error:
            ranks.say(key, f"{FAILED}{error}")
            raise
        ranks.say(key, part.model_dump_json())

    def _other_parts(self) -> list[ManifestPart]:
        """What the other ranks have written. Raises CheckpointError where one of them could not."""
        if self._ranks is None:
            return []
        keys = [f"save {self._num_saves}: part {rank}" for rank in range(1, self._ranks.world_size)]
        texts = [self._ranks.hear(key) for key in keys]
        for text in texts:
            if text.startswith(FAILED):
                raise CheckpointError(text.removeprefix(FAILED))
        return [ManifestPart.model_validate_json(text) for text in texts]

    def _set_aside_later_than(self, step: int) -> None:
        """A run that went back to an older checkpoint has left the later ones: they are not its newest any more."""
        for later in self.latest_steps():
            if later > step:
                path = self._set_aside(self._folder / step_folder_name(later), "superseded")
                self._metrics.pop(later, None)
                self._warn(
                    f"{path}: step {later} belongs to a continuation that this run has left: it went back before."
                )

    def _remove_old(self) -> None:
        metrics = {step: self._metric(step) for step in self.latest_steps()}
        for step in steps_to_remove(metrics, self._settings):
            remove_checkpoint(self._folder / step_folder_name(step))
            self._metrics.pop(step, None)

    def _metric(self, step: int) -> float | None:
        """The metric of a checkpoint, from its manifest when this process did not write it."""
        if step not in self._metrics:
            try:
                metric = load_manifest(self._folder / step_folder_name(step)).about.get("metric")
            except CheckpointError:
                metric = None
            self._metrics[step] = metric if isinstance(metric, int | float) else None
        return self._metrics[step]

    def _set_aside(self, path: Path, reason: str) -> Path:
        target = free_name(self._folder, f"{reason}-{path.name}")
        path.rename(target)
        sync_folder(self._folder)
        return target
