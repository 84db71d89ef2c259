"""A process that has imported all that a rank needs, and forks ranks when it is told to, one after the other.

It belongs to a worker of a cluster (launch/on_ray/host.py), which starts it, passes messages on in both directions and
need not import anything itself. A rank is thus started again without importing anything anew, and its process is forked
from one that holds nothing of the cluster's client, its threads least of all.

Messages are JSON objects. It is told, by `do`:
    listen    address: serve the ranks' store there for the next attempt; answers `listening` with the port
    start     place, config, first_step, terminal: fork the rank; it prints as if on such a terminal, if one is given
    places    wanted: look where the rank spends its time, or no more
    stop      tell the rank to save and stop
    helpless  answers `helpless` with the reason, empty where it is not
    stacks    answers `stacks`
    end       end the rank; answers `ended`
It says: `ready` when everything is imported, or `broken`; `listening`, `helpless`, `stacks` and `ended`; `output`,
what the rank prints; `position` and `window`, as on a HeartbeatBoard; `failure`; `exited` with the exit code. Times are
ages, in seconds: clocks of machines differ.
"""

import json
import os
import shutil
import signal
import socket
import sys
import termios
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any

from launch.forking.rank_process import RankProcess, start_rank
from launch.rank.failure import Failure
from launch.rank.place import Rank
from launch.rank.signals import HeartbeatBoard, Position, StopSignal
from launch.supervision.attempt import POLL_SECONDS, import_for_ranks, rank_work
from launch.supervision.hangs import read_stacks, stopped_processes
from llmtrain.config.schema import RunConfig
from llmtrain.messages import show_messages

Say = Callable[..., None]


@dataclass(frozen=True)
class Terminal:
    """A terminal's size in characters, and its kind, as TERM in the environment names it."""

    columns: int
    rows: int
    kind: str


def own_terminal() -> Terminal | None:
    """The terminal that this process prints to; None where it prints elsewhere."""
    if not sys.stderr.isatty():
        return None
    columns, rows = shutil.get_terminal_size()
    return Terminal(columns, rows, os.environ.get("TERM", "dumb"))


def open_terminal(like: Terminal) -> tuple[int, int]:
    """The descriptors to read from and to print to of a new terminal of that size. Nothing printed is changed."""
    reading, printing = os.openpty()
    termios.tcsetwinsize(printing, (like.rows, like.columns))
    modes = termios.tcgetattr(printing)
    modes[1] &= ~termios.OPOST
    termios.tcsetattr(printing, termios.TCSANOW, modes)
    return reading, printing


class ForkedRank:
    """The rank that an agent has forked, and how much of it has been told already."""

    def __init__(
        self,
        place: Rank,
        config: RunConfig,
        first_step: int,
        held: list[socket.socket],
        terminal: Terminal | None = None,
    ) -> None:
        self._board = HeartbeatBoard(1, first_step)
        self._position = self._board.positions()[0]
        self._windows = 0
        self._stop = StopSignal()
        self._told_to_stop = False
        self._output, printing = open_terminal(terminal) if terminal else os.pipe()
        os.set_blocking(self._output, False)
        work = rank_work(config, self._stop, place, self._board, slot=0)

        def printed() -> int:
            os.close(self._output)
            for number in (1, 2):
                os.dup2(printing, number)
            if terminal:  # libraries choose colours and widths by it
                os.environ["TERM"] = terminal.kind
            return work()

        with self._stop:  # the rank listens from its first moment on
            self._process: RankProcess = start_rank(place, self._stop, held, printed)
        os.close(printing)
        self._exited = False

    @property
    def signs(self) -> list[Any]:
        """The objects to wait for: that it prints, says something or ends."""
        told = [] if self._process.told.closed else [self._process.told]
        ends = [] if self._exited else [self._process.process.sentinel]
        return [*told, *ends, *([self._output] if self._output >= 0 else [])]

    def tell(self, say: Say) -> None:
        """Say what is new."""
        # The end before the rest: what a rank printed or said last is read after it is known to have ended.
        ended = self._process.has_ended()
        failure = self._process.hear_failure()
        self._tell_output(say)
        position = self._board.positions()[0]
        if position != self._position:
            self._position = position
            say("position", **_aged(asdict(position), "since"))
        for number in range(self._windows, self._board.num_windows()):
            say("window", **asdict(self._board.windows(number)[0]))
        self._windows = self._board.num_windows()
        if failure:
            say("failure", **_aged(asdict(failure), "seconds"))
        if ended and not self._exited:
            self._exited = True
            say("exited", code=self._process.process.exitcode)

    def want_places(self, wanted: bool) -> None:
        self._board.want_places(0, wanted)

    def stop(self) -> None:
        """Tell it to save and stop. Only once: told twice, it would stop at once."""
        if not self._told_to_stop and not self._process.has_ended():
            self._told_to_stop = True
            os.kill(self._process.pid, signal.SIGTERM)

    def helpless(self) -> str:
        """The reason why it can do nothing; empty where it can."""
        return stopped_processes({0: self._process.pid}).get(0, "")

    def stacks(self) -> str:
        """The stacks of its threads."""
        if self._process.has_ended():
            return ""
        return read_stacks({0: (self._process.pid, self._process.stacks.fileno())})[0]

    def end(self, say: Say) -> None:
        """End what is left of it, telling what it printed last."""
        self._process.end()
        self._tell_output(say)
        if self._output >= 0:
            os.close(self._output)

    def _tell_output(self, say: Say) -> None:
        while self._output >= 0:
            try:
                printed = os.read(self._output, 1 << 16)
            except BlockingIOError:
                return
            except OSError:  # so ends a terminal that nobody prints to any more
                printed = b""
            if not printed:
                os.close(self._output)
                self._output = -1
                return
            say("output", text=printed.decode("utf-8", "surrogateescape"))


class RankAgent:
    """Carries out what it is told through a connection, until that is closed."""

    def __init__(self, control: Connection) -> None:
        self._control = control
        self._listener: socket.socket | None = None
        self._store: object = None
        self._rank: ForkedRank | None = None

    def run(self) -> None:
        """Return when nobody is at the other end any more; the rank is ended then."""
        try:
            while True:
                wait([self._control, *(self._rank.signs if self._rank else [])], POLL_SECONDS)
                if self._rank:
                    self._rank.tell(self._say)
                while self._control.poll():
                    self._obey(json.loads(self._control.recv_bytes()))
        except (EOFError, ConnectionError):
            return
        finally:
            if self._rank:
                self._rank.end(lambda *_, **__: None)

    def _say(self, kind: str, **facts: Any) -> None:
        self._control.send_bytes(json.dumps({"say": kind, **facts}).encode())

    def _obey(self, message: Mapping[str, Any]) -> None:
        match message["do"]:
            case "listen":
                # The port is taken before anybody knows it, and stays with this process: nobody else can get it.
                self._listener = socket.create_server((message["address"], 0))
                self._say("listening", port=self._listener.getsockname()[1])
            case "start":
                self._start(message)
            case "places" if self._rank:
                self._rank.want_places(message["wanted"])
            case "stop" if self._rank:
                self._rank.stop()
            case "helpless":
                self._say("helpless", text=self._rank.helpless() if self._rank else "")
            case "stacks":
                self._say("stacks", text=self._rank.stacks() if self._rank else "")
            case "end":
                if self._rank:
                    self._rank.end(self._say)
                self._rank = self._store = self._listener = None
                self._say("ended")

    def _start(self, message: Mapping[str, Any]) -> None:
        from launch.rank.rendezvous import serve_store

        config = RunConfig.model_validate_json(message["config"])
        held = [self._listener] if self._listener else []
        terminal = Terminal(**message["terminal"]) if message.get("terminal") else None
        self._rank = ForkedRank(Rank(**message["place"]), config, message["first_step"], held, terminal)
        if self._listener:
            self._store = serve_store(self._listener)


def position_from(facts: Mapping[str, Any]) -> Position:
    """A position as it was said, in the time of this machine."""
    return Position(**_dated(facts, "since"))


def failure_from(facts: Mapping[str, Any], host: str) -> Failure:
    """A failure as it was said by a rank on that host, in the time of this machine."""
    return replace(Failure(**_dated(facts, "seconds")), host=host)


def _aged(facts: dict[str, Any], name: str) -> dict[str, Any]:
    """With a time replaced by its age; 0, which stands before all others, stays."""
    return {**facts, name: time.monotonic() - facts[name] if facts[name] else None}


def _dated(facts: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {**facts, name: 0.0 if facts[name] is None else time.monotonic() - facts[name]}


def main() -> None:
    """`python -m launch.forking.agent DESCRIPTOR ENGINE`: a socket's descriptor, and the engine of its ranks."""
    show_messages()
    control = Connection(int(sys.argv[1]))
    # What a keyboard sends goes to whoever started the run, and comes from there.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        import_for_ranks(sys.argv[2])
        said = {"say": "ready"}
    except Exception as error:
        said = {"say": "broken", "text": f"on {socket.gethostname()}: {type(error).__name__}: {error}"}
    try:
        control.send_bytes(json.dumps(said).encode())
    except ConnectionError:
        return
    if said["say"] == "ready":
        RankAgent(control).run()


if __name__ == "__main__":
    main()
