"""The tasks of a Slurm step: started by srun, connected to the launcher, told what to do (launch/forking/agent.py)."""

import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge, wait
from queue import Empty, Queue

from launch.forking.agent_rank_set import Message
from launch.rank.cores import record_of_user
from launch.rank.place import Rank
from launch.rank.signals import StopSignal
from launch.supervision.attempt import POLL_SECONDS
from llmtrain.config.schema import RunConfig
from llmtrain.errors import LaunchError

END_SECONDS = 30.0
"""Time for srun to end the processes of a step."""

LOST = "its task has ended without a word: killed, or its machine is gone (what srun says of it stands above)"


@dataclass
class Task:
    """One task, as it presented itself. `address` is its machine's, as it can be reached from here."""

    place: Rank
    host: str
    address: str
    control: Connection

    def tell(self, message: Message) -> None:
        """Send a message. A task that is gone is noticed when it is listened to."""
        with suppress(OSError):
            self.control.send_bytes(json.dumps(message).encode())

    def hear(self) -> Message | None:
        """The next message; None where the task is gone."""
        if self.control.closed:
            return None
        try:
            return json.loads(self.control.recv_bytes())
        except (EOFError, OSError):
            self.control.close()
            return None


class SlurmAgents:
    """See `launch.forking.agent_rank_set.RankAgents`: the tasks of a step, by rank."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._tasks = tasks

    def tell(self, rank: int, message: Message) -> None:
        """See `RankAgents`."""
        self._tasks[rank].tell(message)

    def listen(self, seconds: float) -> Iterator[tuple[int, Message]]:
        """See `RankAgents`."""
        ranks = {task.control: rank for rank, task in enumerate(self._tasks) if not task.control.closed}
        if not ranks:
            time.sleep(seconds)
        for control in wait(list(ranks), seconds):
            rank = ranks[control]  # pyright: ignore[reportArgumentType]  # a connection came back
            task = self._tasks[rank]
            while not task.control.closed and task.control.poll():
                yield rank, task.hear() or {"say": "gone", "text": LOST}

    def host(self, rank: int) -> str:
        """See `RankAgents`."""
        return self._tasks[rank].host

    def address(self, rank: int) -> str:
        """See `RankAgents`."""
        return self._tasks[rank].address


class Step:
    """A step of as many tasks as the run has ranks. Its tasks end with the launcher, however that ends."""

    def __init__(self, config: RunConfig, cpus_per_task: int) -> None:
        self._timeout_seconds = config.launch.timeout_seconds
        self._key = secrets.token_bytes(32)
        # srun's tasks reach this machine where srun does: through any of its addresses, so it listens on all.
        self._listener = socket.create_server(("", 0), backlog=max(128, config.launch.num_workers))
        self._met: Queue[Task] = Queue()
        threading.Thread(target=self._accept, name="slurm-tasks", daemon=True).start()
        line = srun_line(config, cpus_per_task)
        threads = str(config.launch.threads_per_worker)
        try:
            # A keyboard's interrupt goes to the launcher alone: srun would end its tasks, unsaved.
            self._srun = subprocess.Popen(
                line,
                stdin=subprocess.PIPE,
                start_new_session=True,
                env={**os.environ, **record_of_user(os.environ), "OMP_NUM_THREADS": threads},
            )
        except OSError as error:
            self._listener.close()
            raise LaunchError(f"srun: cannot be started: {error.strerror}. Is Slurm's client on PATH?") from error
        # By standard input, which only the tasks read: a key on a command line or in the environment is seen by others.
        told = {
            "host": socket.gethostname(),
            "port": self._listener.getsockname()[1],
            "key": self._key.hex(),
            "timeout_seconds": self._timeout_seconds,
            "engine": config.engine.name,
        }
        assert self._srun.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: `gather` says so
            self._srun.stdin.write(json.dumps(told).encode() + b"\n")
            self._srun.stdin.close()

    def gather(self, count: int, stop: StopSignal) -> Sequence[Task] | None:
        """All tasks, by rank, once they have imported what ranks need; None where it is told to stop before.

        Raises LaunchError where some do not come.
        """
        tasks: dict[int, Task] = {}
        ready: set[int] = set()
        deadline = time.monotonic() + self._timeout_seconds
        while len(ready) < count:
            if stop.requested:
                return None
            with suppress(Empty):
                task = self._met.get(timeout=POLL_SECONDS)
                tasks[task.place.rank] = task
            for rank, task in tasks.items():
                while rank not in ready and (task.control.closed or task.control.poll()):
                    if task.hear() is None:
                        raise LaunchError(f"rank {rank} on {task.host}: its task has ended before it was ready")
                    ready.add(rank)
            code = self._srun.poll()
            if code is not None and self._met.empty():
                raise LaunchError(
                    f"srun has ended with exit code {code} before all {count} ranks were ready: it has said why, above"
                )
            if time.monotonic() > deadline:
                missing = ", ".join(str(rank) for rank in range(count) if rank not in ready)
                raise LaunchError(
                    f"ranks {missing} were not ready within launch.timeout_seconds = {self._timeout_seconds:g}"
                )
        return [tasks[rank] for rank in range(count)]

    def end(self, tasks: Sequence[Task] = ()) -> None:
        """End all processes of the step: without their launcher, the tasks end their ranks and themselves."""
        self._listener.close()
        for task in tasks:
            task.control.close()
        while not self._met.empty():
            self._met.get().control.close()
        try:
            self._srun.wait(END_SECONDS / 3 if tasks else 0)
        except subprocess.TimeoutExpired:
            self._srun.terminate()  # it has the processes of its step killed
            with suppress(subprocess.TimeoutExpired):
                self._srun.wait(END_SECONDS)
        if self._srun.poll() is None:
            self._srun.kill()
            self._srun.wait()

    def _accept(self) -> None:
        """Let tasks in, until the listener is closed. One that does not prove itself keeps no other waiting."""
        with suppress(OSError):
            while True:
                connected, (address, *_) = self._listener.accept()
                threading.Thread(target=self._meet, args=(connected, address), daemon=True).start()

    def _meet(self, connected: socket.socket, address: str) -> None:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        control = Connection(connected.detach())
        try:
            # The reverse order of the task's: each end waits for the other's challenge in turn.
            deliver_challenge(control, self._key)
            answer_challenge(control, self._key)
            said = json.loads(control.recv_bytes())
        except (OSError, EOFError, AuthenticationError):
            control.close()
            return
        self._met.put(Task(Rank(**said["place"]), said["host"], address, control))


def srun_line(config: RunConfig, cpus_per_task: int) -> list[str]:
    """The command that starts one task per rank, spread evenly over the nodes, neighbours on one node."""
    launch = config.launch
    return [
        "srun",
        f"--nodes={launch.slurm.nodes}",
        f"--ntasks={launch.num_workers}",
        f"--ntasks-per-node={launch.num_workers // launch.slurm.nodes}",
        f"--cpus-per-task={cpus_per_task}",
        "--distribution=block",
        "--kill-on-bad-exit=1",
        "--mpi=none",
        sys.executable,
        "-m",
        "launch.on_slurm.task",
    ]
