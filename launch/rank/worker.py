"""One rank of a run, the same in every launcher: threads, device, start, group, training, exit code."""

import json
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.distributed as dist

from launch.rank.cores import num_threads
from launch.rank.device import choose_device, settled, start_threads
from launch.rank.failure import OtherRankFailedError
from launch.rank.place import ALONE, Rank
from launch.rank.rendezvous import anybody, connect, lone_store, open_group, open_rank_store
from launch.rank.signals import Heartbeat, StopSignal
from llmtrain.checkpoint.agreement import RankStore
from llmtrain.checkpoint.folders import CHECKPOINTS
from llmtrain.config.budget import Budget
from llmtrain.config.engines import ENGINES
from llmtrain.errors import EXIT_PREEMPTED, LlmtrainError, NoProgressError, RunFolderInUseError
from llmtrain.files import open_log
from llmtrain.messages import show_messages
from llmtrain.models.float8 import require_float8
from llmtrain.plan.memory import advise
from llmtrain.preflight.resolve import ResolvedRun
from llmtrain.report.efficiency import DONE, STOPPED_EARLY, run_efficiency
from llmtrain.runs.folder import RunFolder, Status, read_status, was_taken_over
from llmtrain.runs.rank_logs import log_path
from llmtrain.train.ending import best_text, early_stop_text, nothing_left
from llmtrain.train.health import StallLimit, skipped_text
from llmtrain.train.loop import Run, train
from llmtrain.train.setup import setup
from llmtrain.train.start import Start, describe_start, find_start, join_start
from llmtrain.train.state import TrainState
from llmtrain.values.progress import Phase


def unwatched(phase: Phase, step: int) -> None:
    """The heartbeat of a rank that nobody watches over."""


def run_worker(
    resolved: ResolvedRun,
    stop: StopSignal,
    place: Rank = ALONE,
    heartbeat: Heartbeat = unwatched,
    change_run: Callable[[Run, Rank], Run] | None = None,
) -> int:
    """Train, or continue, the run; returns the exit code.

    launch.num_workers is the world size. Rank 0 holds the run folder, decides what the run continues from and records
    it; the others wait for that decision. `heartbeat` hears where this rank is; `change_run` may replace parts of the
    run.
    """
    config = resolved.config
    assert config.launch.num_workers == place.world_size
    start_threads(num_threads(config.launch, place.local_world_size))
    device = choose_device(config.launch, place)
    if config.train.precision == "fp8":
        require_float8(device)
    run_dir, timeout_seconds = resolved.run_dir, config.launch.timeout_seconds
    with ExitStack() as held:
        held.enter_context(settled(config, device))
        if place.world_size == 1:
            folder = held.enter_context(RunFolder(run_dir, place.attempt, place.launch_id))
            attempt = Attempt(resolved, device, find_start(resolved, folder), folder, place, heartbeat, change_run)
            if not attempt.finished_before:
                held.enter_context(rank_log(run_dir, place))
            if ENGINES[config.engine.name].needs_group and not attempt.finished_before:
                open_group(lone_store(), place, device, timeout_seconds)
            return attempt.run(lambda: stop.requested)
        # In this order: rank 0 serves the store, by which the ranks agree on a start. A group, which costs every rank a
        # connection to every other, is made only where something is left to do.
        store = connect(place, timeout_seconds)
        ranks = open_rank_store(place, timeout_seconds)
        folder, start, lock_token = agree_on_start(resolved, place, ranks, held)
        attempt = Attempt(resolved, device, start, folder, place, heartbeat, change_run, lock_token)
        if attempt.finished_before:
            return attempt.run(lambda: stop.requested)
        held.enter_context(rank_log(run_dir, place))
        open_group(store, place, device, timeout_seconds)
        code = attempt.run(lambda: anybody(stop.requested), anybody)
        dist.destroy_process_group()  # after success alone: after a failure it would wait for ranks that are gone
        return code


@dataclass(frozen=True)
class Attempt:
    """One rank's part of one attempt to bring a run to its end.

    Only rank 0 has the folder; the others know its `lock_token`.
    """

    resolved: ResolvedRun
    device: torch.device
    start: Start
    folder: RunFolder | None
    place: Rank
    heartbeat: Heartbeat
    change_run: Callable[[Run, Rank], Run] | None
    lock_token: str = ""

    @property
    def finished_before(self) -> bool:
        return self.start.step >= self._total_steps or self._stopped_early(self.start.state) is not None

    def _stopped_early(self, state: TrainState) -> str | None:
        """Why a run has ended before its last step; None for one that has not."""
        stop = self.resolved.early_stop
        if stop is None or not stop.is_over(state.patience):
            return None
        return early_stop_text(stop, state.patience, state.step)

    def _closing(self, state: TrainState) -> str:
        """All that is said at the end of a run that is done: an early stop, skipped steps, the best checkpoint."""
        best = ""
        if self.resolved.config.checkpoint.keep_best:
            metric = self.resolved.config.evaluate.metric
            best = best_text(self.resolved.run_dir / CHECKPOINTS, self.start.manager.best(), metric)
        return "; ".join(filter(None, (self._stopped_early(state), skipped_text(state), best)))

    @property
    def _total_steps(self) -> int:
        return Budget.of(self.resolved.config).last_step(self.start.state.seen)

    def run(self, stop_requested: Callable[[], bool], on_any_rank: Callable[[bool], bool] = bool) -> int:
        """Train to the end or until told to stop; returns the exit code. `on_any_rank`: is it set on any?"""
        if self.finished_before:
            self._require_result()
            if self.folder:
                self._tell_finished(self.folder)
            return 0
        self._write_status("running", self.start.step, "starting")
        run = None
        try:
            run = setup(self.resolved, self.folder, self.start, self.device, self.place.rank, self.heartbeat)
            changed = self.change_run(run, self.place) if self.change_run else run
            status, state = train(changed, stop_requested, on_any_rank)
        except BaseException as error:
            advise(error, self.resolved.config, self.device.type)
            # Where rank 0 has lost the run folder, that is why the others fail too.
            if self.folder is None and was_taken_over(self.resolved.config.run_dir, self.lock_token):
                raise OtherRankFailedError("rank 0 has lost the run folder", RunFolderInUseError.exit_code) from error
            if run:
                run.monitor.close("failed")
            said = f"{type(error).__name__}: {error}"
            status = "stalled" if isinstance(error, NoProgressError) else "failed"
            with suppress(LlmtrainError, OSError):  # a full disk must not hide why the run has failed
                before = read_status(self.folder.path) if self.folder else None
                self._write_status(status, before.step if before else self.start.step, said, said)
            raise
        if self.folder:
            with suppress(LlmtrainError, OSError):  # what cannot be read or written is no reason to fail in the end
                if status == "done":
                    early = self._stopped_early(state)
                    facts = {"reason": early} if early else {}
                    self.folder.record(STOPPED_EARLY if early else DONE, step=state.step, **facts)
                run.monitor.say(str(run_efficiency(self.folder.path)))
        message = "told to stop; the same command continues"
        if self.folder and status == "done":
            message = self._closing(state)
            if skipped_text(state):
                run.monitor.say(f"warning: {skipped_text(state)}")
            if message != skipped_text(state):
                run.monitor.say(message)
        run.monitor.close(status)
        self._write_status(
            status, state.step, message, total_steps=Budget.of(self.resolved.config).last_step(state.seen)
        )
        return 0 if status == "done" else EXIT_PREEMPTED

    def _tell_finished(self, folder: RunFolder) -> None:
        """The answer of a command that has nothing left to do, and so on stdout."""
        state = self.start.state
        if self._stopped_early(state) is None:
            print(f"{folder.path}: {nothing_left(self.resolved.config, state.seen)}")
            self._write_status("done", self.start.step, "finished before")
            return
        more = f"Raise evaluate.stop_after above {state.patience.evaluations}, or set it to null, to go on."
        print(f"{folder.path}: already done: {self._closing(state)}. {more}")
        self._write_status("done", self.start.step, self._closing(state))

    def _require_result(self) -> None:
        """Raise NoProgressError where a run has made all its steps and they came to nothing."""
        try:
            limit = StallLimit(self.resolved.config.health.max_skipped_steps, self.resolved.config.train.precision)
            limit.require_result(self.start.state)
        except NoProgressError as error:
            self._write_status("stalled", self.start.step, str(error), str(error))
            raise

    def _write_status(
        self, status: Status, step: int, message: str, cause: str = "", total_steps: int | None = None
    ) -> None:
        if self.folder:
            self.folder.write_status(status, step, total_steps or self._total_steps, message, cause)


def agree_on_start(
    resolved: ResolvedRun, place: Rank, ranks: RankStore, held: ExitStack
) -> tuple[RunFolder | None, Start, str]:
    """Rank 0 locks the run folder, until `held` closes, and decides where the run begins; the others hear of it.

    Returns the folder on rank 0, the start, and the lock's token.

    Raises on rank 0 what `find_start` and the lock raise, on the others OtherRankFailedError with the same exit code.
    """
    if ranks.rank > 0:
        said = json.loads(ranks.get("start"))
        if "exit_code" in said:
            raise OtherRankFailedError("rank 0 could not start", said["exit_code"])
        return None, join_start(resolved, said, ranks), said["lock_token"]
    try:
        folder = held.enter_context(RunFolder(resolved.run_dir, place.attempt, place.launch_id))
        start = find_start(resolved, folder, ranks)
    except BaseException as error:
        exit_code = error.exit_code if isinstance(error, LlmtrainError) else 1
        ranks.put("start", json.dumps({"exit_code": exit_code}))
        raise
    ranks.put("start", json.dumps({**describe_start(start), "lock_token": folder.lock_token}))
    return folder, start, folder.lock_token


@contextmanager
def rank_log(run_dir: Path, place: Rank) -> Iterator[None]:
    """Append what this process prints to its log, headed by a line about the attempt; an error that leaves is kept too.

    Rank 0, alone or not, goes on printing where it did: its console writes plain lines to the log as well.
    """
    path = log_path(run_dir, place.rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    with open_log(path) as log:
        where = f"on {socket.gethostname()}, process {os.getpid()}"
        log.write(f"=== {now} rank {place.rank} of {place.world_size} {where}\n")
        log.flush()
        before = _redirect(log.fileno()) if place.rank > 0 else ()
        if before:
            show_messages()  # all of them: this log is its own
        try:
            yield
        except BaseException:
            log.write(traceback.format_exc())
            raise
        finally:
            for number, old in before:
                _flush()
                os.dup2(old, number)
                os.close(old)


def _redirect(target: int) -> tuple[tuple[int, int], ...]:
    """Let stdout and stderr of this process, below Python too, go to a file; returns what they were."""
    _flush()
    before = tuple((number, os.dup(number)) for number in (1, 2))
    for number, _ in before:
        os.dup2(target, number)
    return before


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
