"""One rank of a run, the same in every launcher: threads, device, start, group, training, exit code."""

import json
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import torch
import torch.distributed as dist

from launch.rank.cores import num_threads
from launch.rank.failure import OtherRankFailedError
from launch.rank.heartbeat import Heartbeat
from launch.rank.log import rank_log
from launch.rank.place import ALONE, Rank
from launch.rank.rendezvous import anybody, connect, lone_store, open_exchange, open_group
from launch.rank.stop import StopSignal
from llmtrain.checkpoint.exchange import Exchange
from llmtrain.config.budget import Budget, Seen
from llmtrain.config.engines import ENGINES
from llmtrain.config.launch import LaunchConfig
from llmtrain.config.schema import RunConfig
from llmtrain.errors import EXIT_PREEMPTED, ConfigError, LlmtrainError, NoProgressError, RunFolderInUseError
from llmtrain.plan.memory_advice import advise
from llmtrain.preflight.resolve import ResolvedRun
from llmtrain.report.efficiency import DONE, run_efficiency
from llmtrain.runs.folder import RunFolder, Status, read_status, was_taken_over
from llmtrain.train.health import StallLimit, skipped_text
from llmtrain.train.loop import Run, train
from llmtrain.train.setup import setup
from llmtrain.train.start import Start, describe_start, find_start, join_start
from llmtrain.values.progress import Phase


def unwatched(phase: Phase, step: int) -> None:
    """The heartbeat of a rank that nobody watches over."""


def unchanged(run: Run, place: Rank) -> Run:
    """The parts of a run as they are; a drill puts others in their place."""
    return run


def run_worker(
    resolved: ResolvedRun,
    stop: StopSignal,
    place: Rank = ALONE,
    heartbeat: Heartbeat = unwatched,
    change_run: Callable[[Run, Rank], Run] = unchanged,
) -> int:
    """Train, or continue, the run; returns the exit code.

    launch.num_workers is the world size. Rank 0 holds the run folder, decides what the run continues from and records
    it; the others wait for that decision. `heartbeat` hears where this rank is; `change_run` may replace parts of the
    run.
    """
    config = resolved.config
    assert config.launch.num_workers == place.world_size
    torch.set_num_threads(num_threads(config.launch, place.local_world_size))
    device = choose_device(config.launch, place)
    run_dir, timeout_seconds = resolved.run_dir, config.launch.timeout_seconds
    with ExitStack() as held:
        if place.world_size == 1:
            folder = held.enter_context(RunFolder(run_dir, place.attempt, place.launch_id))
            attempt = Attempt(resolved, device, find_start(resolved, folder), folder, place, heartbeat, change_run)
            if not attempt.finished_before:
                held.enter_context(rank_log(run_dir, place))
            if ENGINES[config.engine.name].needs_group and not attempt.finished_before:
                open_group(lone_store(), place, device, timeout_seconds)
            return attempt.run(lambda: stop.requested)
        store = connect(place, timeout_seconds)
        ranks = open_exchange(place, timeout_seconds)
        folder, start, lock_token = agree_on_start(resolved, place, ranks, held)
        attempt = Attempt(resolved, device, start, folder, place, heartbeat, change_run, lock_token)
        if attempt.finished_before:
            return attempt.run(lambda: stop.requested)
        held.enter_context(rank_log(run_dir, place))
        open_group(store, place, device, timeout_seconds)
        code = attempt.run(lambda: anybody(stop.requested), anybody)
        dist.destroy_process_group()
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
    change_run: Callable[[Run, Rank], Run]
    lock_token: str = ""

    @property
    def config(self) -> RunConfig:
        return self.resolved.config

    @property
    def finished_before(self) -> bool:
        return self.start.step >= self._total_steps

    @property
    def _total_steps(self) -> int:
        return Budget.of(self.config).last_step(self.start.state.seen)

    def run(self, stop_requested: Callable[[], bool], on_any_rank: Callable[[bool], bool] = bool) -> int:
        """Train to the end or until told to stop; returns the exit code. `on_any_rank`: is a flag set on any rank?"""
        if self.finished_before:
            self._require_result()
            if self.folder:
                # The answer of the command, and so on stdout.
                print(f"{self.folder.path}: {nothing_left(self.config, self.start.state.seen)}")
            self._write_status("done", self.start.step, "finished before")
            return 0
        self._write_status("running", self.start.step, "starting")
        run = None
        try:
            run = setup(self.resolved, self.folder, self.start, self.device, self.place.rank, self.heartbeat)
            status, state = train(self.change_run(run, self.place), stop_requested, on_any_rank)
        except BaseException as error:
            advise(error, self.config, self.device.type)
            self._require_own_run(error)
            if run:
                run.monitor.close("failed")
            said = f"{type(error).__name__}: {error}"
            status = "stalled" if isinstance(error, NoProgressError) else "failed"
            with suppress(LlmtrainError, OSError):  # a full disk must not hide why the run has failed
                self._write_status(status, self._last_step(), said, said)
            raise
        if self.folder:
            with suppress(LlmtrainError, OSError):  # what cannot be read or written is no reason to fail in the end
                if status == "done":
                    self.folder.record(DONE, step=state.step)
                run.monitor.say(str(run_efficiency(self.folder.path)))
        message = skipped_text(state) if status == "done" else "told to stop; the same command continues"
        if message and status == "done":
            run.monitor.say(f"warning: {message}")
        run.monitor.close(status)
        self._write_status(status, state.step, message, total_steps=Budget.of(self.config).last_step(state.seen))
        return 0 if status == "done" else EXIT_PREEMPTED

    def _require_result(self) -> None:
        """That a run has made all its steps is no success where they came to nothing. Raises NoProgressError."""
        try:
            limit = StallLimit(self.config.health.max_skipped_steps, self.config.train.precision)
            limit.require_result(self.start.state)
        except NoProgressError as error:
            self._write_status("stalled", self.start.step, str(error), str(error))
            raise

    def _require_own_run(self, error: BaseException) -> None:
        """On another rank than 0: where rank 0 has lost the run folder, that is why this one fails too."""
        if self.folder is None and was_taken_over(self.config.run_dir, self.lock_token):
            raise OtherRankFailedError("rank 0 has lost the run folder", RunFolderInUseError.exit_code) from error

    def _last_step(self) -> int:
        """The last step that the status has, which follows training."""
        status = read_status(self.folder.path) if self.folder else None
        return status.step if status else self.start.step

    def _write_status(
        self, status: Status, step: int, message: str, cause: str = "", total_steps: int | None = None
    ) -> None:
        if self.folder:
            self.folder.write_status(status, step, total_steps or self._total_steps, message, cause)


def nothing_left(config: RunConfig, seen: Seen) -> str:
    """Why a run that has all that behind it has nothing to do, and which number would change that."""
    steps, tokens = config.train.steps, config.train.tokens
    if tokens is not None:
        done = f"{seen.data_tokens} tokens in {seen.step} steps, and train.tokens asks for {tokens}"
        return f"already done, {done}. Raise train.tokens above {seen.data_tokens} to go on."
    done = f"all {seen.step} steps" if seen.step == steps else f"{seen.step} steps, and train.steps asks for {steps}"
    return f"already done, {done}. Raise train.steps above {seen.step} to go on."


def agree_on_start(
    resolved: ResolvedRun, place: Rank, ranks: Exchange, held: ExitStack
) -> tuple[RunFolder | None, Start, str]:
    """Rank 0 locks the run folder, until `held` closes, and decides where the run begins; the others hear of it.

    Returns the folder on rank 0, the start, and the lock's token.

    Raises on rank 0 what `find_start` and the lock raise, on the others OtherRankFailedError with the same exit code.
    """
    if ranks.rank > 0:
        said = json.loads(ranks.hear("start"))
        if "exit_code" in said:
            raise OtherRankFailedError("rank 0 could not start", said["exit_code"])
        return None, join_start(resolved, said, ranks), said["lock_token"]
    try:
        folder = held.enter_context(RunFolder(resolved.run_dir, place.attempt, place.launch_id))
        start = find_start(resolved, folder, ranks)
    except BaseException as error:
        exit_code = error.exit_code if isinstance(error, LlmtrainError) else 1
        ranks.say("start", json.dumps({"exit_code": exit_code}))
        raise
    ranks.say("start", json.dumps({**describe_start(start), "lock_token": folder.lock_token}))
    return folder, start, folder.lock_token


def choose_device(config: LaunchConfig, place: Rank) -> torch.device:
    """The device of this rank. Raises ConfigError where a GPU is asked for and absent, or ranks outnumber GPUs."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "launch.device = cuda: PyTorch finds no GPU here. Set launch.device=cpu, or check `nvidia-smi`."
        )
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if place.device is not None:
        return torch.device("cuda", place.device)
    if place.local_world_size > torch.cuda.device_count():
        raise ConfigError(
            f"launch.num_workers: {place.local_world_size} ranks on {socket.gethostname()}, which has "
            f"{torch.cuda.device_count()} GPUs. Start as many ranks as there are GPUs, or set launch.device=cpu."
        )
    return torch.device("cuda", place.local_rank)
