"""The checkpoints of a run: when they are written behind training, which are kept, which one a run continues from."""

import logging
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.checkpoint.agreement import RankStore, SaveMessages
from llmtrain.checkpoint.find import find_newest_valid
from llmtrain.checkpoint.folders import (
    BASE,
    BEST_BY,
    TEACHER,
    best_of,
    checkpoint_steps,
    step_folder_name,
    step_of_folder,
    steps_to_remove,
)
from llmtrain.checkpoint.manifest import (
    ManifestPart,
    load_manifest,
    writing_folder_name,
)
from llmtrain.checkpoint.pruned import PRUNED
from llmtrain.checkpoint.reader import CheckpointReader, open_checkpoint
from llmtrain.checkpoint.writer import (
    Contents,
    HostCopy,
    free_name,
    publish,
    recover,
    remove_checkpoint,
    size_bytes,
    start_checkpoint,
    write_rank_files,
)
from llmtrain.config.metrics import row_of_metric
from llmtrain.config.schema import CheckpointConfig
from llmtrain.errors import CheckpointError, SaveError
from llmtrain.files import sync_folder
from llmtrain.values.fragment import Fragment

_logger = logging.getLogger(__name__)


@dataclass
class Reports:
    """The listeners to what happens to checkpoints: a person, and the run's audit log.

    `warn` takes a text. `record` takes the name of an event and its facts as keywords; where it raises OSError,
    training goes on. `ensure_held` is asked before anything is changed; it raises RunFolderInUseError where the run is
    another process's by now.
    """

    warn: Callable[[str], object] = _logger.warning
    record: Callable[..., object] = lambda event, **facts: None
    ensure_held: Callable[[], object] = lambda: None


class CheckpointManager:
    """Saves and finds the checkpoints of one run.

    `folder` is the run's `checkpoints` folder. Make one only while holding the run folder's lock: it removes what
    killed saves left behind. `about` says where checkpoints come from (layout, engine), and with `evaluated_on` and
    `best_by` what their metric is and was measured on; it goes into each manifest.
    Where several ranks hold the state, each has a manager with `ranks`; all save the same steps, in the same order.
    Rank 0, which holds the lock, publishes what all have written, and reports. Where one rank cannot write, the
    checkpoint is not there for any of them.
    """

    def __init__(
        self,
        folder: Path,
        settings: CheckpointConfig,
        config_text: str,
        about: Mapping[str, Any],
        reports: Reports | None = None,
        ranks: RankStore | None = None,
    ) -> None:
        self.reports = reports or Reports()
        self._ranks = ranks
        self._num_saves = 0
        self._folder = Path(folder)
        self._settings = settings
        self._config_text = config_text
        self._about = dict(about)
        self._host_copy = HostCopy()
        self._writer: ThreadPoolExecutor | None = None
        self._running: tuple[int, Future[None]] | None = None
        self._failure: SaveError | None = None
        self._metrics: dict[int, float | None] = {}
        self.moved_base: Path | None = None
        """Where a base is looked for that is not where it was: see `open_checkpoint`."""
        if self._reports_here:
            recover(self._folder)

    @property
    def _reports_here(self) -> bool:
        return self._ranks is None or self._ranks.rank == 0

    def rest_on(self, base: Mapping[str, str]) -> None:
        """Name the checkpoint that has the frozen weights in all that is saved from now on."""
        self._about[BASE] = dict(base)

    def learn_from(self, teacher: Mapping[str, str]) -> None:
        """Name the checkpoint of the teacher in all that is saved from now on."""
        self._about[TEACHER] = dict(teacher)

    def descend_from(self, checkpoint: CheckpointReader) -> None:
        """Say in all that is saved from now on what that one says of its pruning."""
        if PRUNED in checkpoint.about:
            self._about[PRUNED] = checkpoint.about[PRUNED]

    def latest_steps(self) -> list[int]:
        """Steps of the checkpoints on the disk, newest first."""
        return checkpoint_steps(self._folder)

    def best(self) -> tuple[int, float] | None:
        """The step and the metric of the best checkpoint on the disk, of those whose metrics can be compared."""
        return best_of({step: self._metric(step) for step in self.latest_steps()}, self._rises)

    @property
    def _rises(self) -> bool:
        row = row_of_metric(self._about.get(BEST_BY, "loss"))
        assert row is not None, "a key of the configuration"
        return row.rises

    def open(self, path: Path) -> CheckpointReader:
        """One that another rank has found valid: its tensor files are not hashed again."""
        return open_checkpoint(path, verify=False, moved_base=self.moved_base)

    def newest_valid(self, before_step: int | None = None) -> CheckpointReader | None:
        """The newest checkpoint that is whole, every file hashed, of those before a step; None where there is none.

        Damaged newer ones are renamed to `damaged-step-...` and reported, so that nothing takes them for newest
        again. Raises as `find_newest_valid` does, and then renames nothing.
        """
        self.wait()
        reader, damaged = find_newest_valid(self._folder, self._warn, before_step, self.moved_base)
        for path, error in damaged:
            self._set_aside(path, "damaged", str(error))
        if before_step is None and not damaged:
            # A run that died before it removed an old one may have no save to come that would.
            self._remove_old()
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

        Waits for the save before: two never run at once. `before_publish` runs right before the checkpoint becomes
        visible, with `async_save` in the writer's thread. `metric` is the value that `keep_best` goes by.
        What the file system does not take leaves nothing, is reported, and the next save may succeed. With
        `on_save_error` stop it is raised as SaveError: where it ran behind training, by `poll`, `wait` or the next one.
        """
        self.wait()
        self._failure = None
        best_by = metric if metric is not None and math.isfinite(metric) else None
        contents = Contents(step, state, self._config_text, {**self._about, "metric": best_by})
        self._num_saves += 1
        messages = SaveMessages(self._ranks, self._num_saves)
        if not self._settings.async_save:
            # All at once: making fragments may need all ranks, and one of them may have to give up early.
            held = list(fragments)
            self._settle(step, lambda: self._write(messages, contents, held, before_publish))
            return
        copies = self._host_copy.take(fragments)
        self._writer = self._writer or ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._running = (step, self._writer.submit(self._write, messages, contents, copies, before_publish))

    def poll(self) -> None:
        """Report a save that has failed behind training, once that is known. Waits for nothing. Raises as `wait`."""
        if self._running is not None and self._running[1].done():
            self.wait()

    def wait(self) -> None:
        """Return once nothing is being written. Raises SaveError for a failed save with `on_save_error` stop."""
        running, self._running = self._running, None
        if running is not None:
            self._settle(running[0], running[1].result)

    def finish(self) -> None:
        """End with a whole checkpoint: as `wait`, and raises SaveError where the newest save has failed."""
        self.wait()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _settle(self, step: int, result: Callable[[], object]) -> None:
        """Take the result of a save. Training may go on where the file system refused it; other errors end the run."""
        try:
            result()
        except SaveError as error:
            self._failure = error
            if self._reports_here:
                self._record("save_failed", step=step, error=str(error))
            if self._settings.on_save_error == "stop":
                self._failure = None
                raise
            if self._reports_here:
                self._warn(f"step {step:,} is not saved (checkpoint.on_save_error = continue): {error}")

    def _write(
        self,
        messages: SaveMessages,
        contents: Contents,
        fragments: list[Fragment],
        before_publish: Callable[[], object],
    ) -> None:
        if not self._reports_here:
            self._write_part(messages, contents.step, fragments)
            return

        def before_rename() -> None:
            self.reports.ensure_held()  # the last look before the rename, as writing may have taken minutes
            before_publish()
            # Not after it: a run that dies in between must not continue from what it has left.
            self.set_aside_later_than(contents.step)

        writing = self._start(messages, contents.step, size_bytes(fragments))
        try:
            parts = self._gather_parts(messages, writing, fragments)
            publish(writing, parts, contents, before_rename)
        except BaseException as error:
            messages.send_failure("outcome", error)
            self.reports.ensure_held()  # another owner may be writing to a folder of this name
            shutil.rmtree(writing, ignore_errors=True)
            raise
        # Before old ones are removed: the other ranks need not wait for that.
        messages.send("outcome", "")
        self._metrics[contents.step] = contents.about["metric"]
        self._remove_old()

    def _start(self, messages: SaveMessages, step: int, needed: int) -> Path:
        """Make the folder that all ranks write into, if what all of them need fits."""
        try:
            needed += sum(int(text) for text in messages.receive_from_others("need"))
            self.reports.ensure_held()
            writing = start_checkpoint(self._folder, step, needed)
        except BaseException as error:
            messages.send_failure("folder", error)
            raise
        messages.send("folder", "")
        return writing

    def _gather_parts(self, messages: SaveMessages, writing: Path, fragments: list[Fragment]) -> list[ManifestPart]:
        """Write what rank 0 holds; returns all ranks' parts once no rank writes any more."""
        try:
            own = write_rank_files(writing, 0, fragments)
        except SaveError:
            # The others may still be writing into the folder that is removed next.
            with suppress(SaveError):
                messages.receive_from_others("part")
            raise
        return [own, *map(ManifestPart.model_validate_json, messages.receive_from_others("part"))]

    def _write_part(self, messages: SaveMessages, step: int, fragments: list[Fragment]) -> None:
        """Write what this rank holds, once rank 0 has made the folder; returns once the checkpoint is there."""
        messages.send("need", str(size_bytes(fragments)))
        messages.receive_from_first("folder")
        try:
            writing = self._folder / writing_folder_name(step)
            part = (
                write_rank_files(writing, messages.rank, fragments) if fragments else ManifestPart(files={}, tensors={})
            )
        except BaseException as error:
            messages.send_failure("part", error)
            raise
        messages.send("part", part.model_dump_json())
        messages.receive_from_first("outcome")

    def set_aside_later_than(self, step: int) -> None:
        """A run that went back to an older checkpoint has left the later ones: they are not its newest any more."""
        for later in self.latest_steps():
            if later > step:
                why = f"step {later} belongs to a continuation that this run has left: it went back before."
                path = self._set_aside(self._folder / step_folder_name(later), "superseded", why)
                self._metrics.pop(later, None)
                self._warn(f"{path}: {why}")

    def _remove_old(self) -> None:
        self.reports.ensure_held()
        metrics = {step: self._metric(step) for step in self.latest_steps()}
        try:
            for step in steps_to_remove(metrics, self._settings, self._rises):
                remove_checkpoint(self._folder / step_folder_name(step))
                self._metrics.pop(step, None)
        except OSError as error:
            path = error.filename or self._folder
            self._warn(f"{path}: an old checkpoint could not be removed: {error.strerror}")

    def _metric(self, step: int) -> float | None:
        """The metric of a checkpoint, from its manifest when this process did not write it.

        None where it was measured on something else than this process measures on: such values cannot be compared.
        """
        if step not in self._metrics:
            try:
                about = load_manifest(self._folder / step_folder_name(step)).about
            except CheckpointError:
                about = {}
            metric, own = about.get("metric"), self._about.get("evaluated_on")
            comparable = isinstance(metric, int | float) and about.get("evaluated_on", own) == own
            self._metrics[step] = metric if comparable else None
        return self._metrics[step]

    def _set_aside(self, path: Path, reason: str, why: str) -> Path:
        self.reports.ensure_held()
        target = free_name(self._folder, f"{reason}-{path.name}")
        self._record("set_aside", step=step_of_folder(path.name), reason=reason, folder=target.name, error=why)
        path.rename(target)
        sync_folder(self._folder)
        return target

    def _warn(self, text: str) -> None:
        """Tell a person. A full disk may not take a line of a log either: training goes on."""
        with suppress(OSError):
            self.reports.warn(text)

    def _record(self, event: str, **facts: object) -> None:
        """Write into the audit log. A disk that does not take a checkpoint may not take this line either."""
        try:
            self.reports.record(event, **facts)
        except OSError as error:
            self._warn(f"{error.filename or self._folder}: {event} is not in the audit log: {error.strerror}")
