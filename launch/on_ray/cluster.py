"""The Ray that a run's ranks are started on: one of the run's own, or a cluster that exists.

Ray reads what it is told through the environment when it is imported and when its processes start. So it is imported
here, once the environment is right, and everything else below `launch/on_ray/` is imported within `ray_cluster`.
"""

import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from filelock import lock_descriptor

from launch.forking.environment import changed_environment
from launch.on_ray.access import ask_head, is_on_loopback, split_address, token_for
from llmtrain.config.launch import LaunchConfig
from llmtrain.errors import LaunchError

PREFIX = "llmtrain-ray-"
LONGEST_PATH = 38
"""Ray puts sockets into a folder in it with one letter, with names of up to 66 characters; a socket's path may have
107."""


@contextmanager
def private_folder() -> Iterator[Path]:
    """A new folder that only this user may enter, removed in the end. Folders whose owner is dead are removed first.

    It is short enough for Ray's sockets: in the system's folder for temporary files, or else in /tmp.
    """
    parent = Path(tempfile.gettempdir())
    if len(str(parent)) + len(PREFIX) + 9 > LONGEST_PATH:
        parent = Path("/tmp")
    _remove_abandoned(parent)
    # It gets its name once it is locked: under that name it is never found without an owner that lives.
    unnamed = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=parent))
    lock = os.open(unnamed, os.O_RDONLY | os.O_DIRECTORY)
    lock_descriptor(lock)
    folder = unnamed.rename(parent / unnamed.name.removeprefix("."))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _remove_abandoned(parent: Path) -> None:
    for folder in parent.glob(f"{PREFIX}*"):
        # Others' folders, and those that are gone meanwhile, are not ours to remove.
        with suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if lock_descriptor(lock, blocking=False):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


LOOPBACK = "127.0.0.1"
OBJECT_STORE_BYTES = 100 << 20
"""Room for what ranks say to their launcher, which is small. Ray takes no less than 75 MiB."""

SILENCE_SECONDS = 15.0
"""A head that has not answered for so long counts as dead: a restart of a head with storage of its own takes less."""

START_TRIES = 3
"""Ray gives its own processes half a minute to start, and no setting changes that. Where its files come from a cold
network disk, or the machine is busy, the first start may take longer, and the next finds the files in memory."""

ASK_SECONDS = 5.0
SHUTDOWN_SECONDS = 10.0

KNOWN_BY_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Despite its name: 0 lets a node know itself as 127.0.0.1 on Linux too, and all servers of Ray listen there only."""

OF_ANY_RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray ends a process whose head is gone, without a word. We say what happened, and have to be earlier.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "90",
}
OF_OUR_RAY = {
    **OF_ANY_RAY,
    "RAY_AUTH_MODE": "token",
    KNOWN_BY_LOOPBACK: "0",
    # Pages of figures that ask for no token: on ports that do not exist they are not opened.
    "RAY_enable_metrics_collection": "0",
    "AUTOSCALER_METRIC_PORT": "-1",
    "DASHBOARD_METRIC_PORT": "-1",
    # One idle process per CPU would be started beside the ranks.
    "RAY_prestart_worker_first_driver": "0",
    # Ranks are not to give way to whatever else runs.
    "RAY_worker_niceness": "0",
}


RAY_FOLDER = "r"
"""Ray's part of a private folder. It makes it itself."""


@dataclass
class Cluster:
    """A Ray that this process is connected to. `own` says that it was started for this run and ends with it."""

    address: str
    own: bool
    node_ip: str
    token: str | None = field(repr=False)
    _last_answer: float = field(default_factory=time.monotonic, repr=False)

    def is_alive(self) -> bool:
        """True where the head has answered within the last SILENCE_SECONDS.

        Asks it, which takes milliseconds, or ASK_SECONDS where it is silent. May be called from any thread.
        """
        if ask_head(self.address, self.token, ASK_SECONDS) != "silent":
            self._last_answer = time.monotonic()
        return time.monotonic() - self._last_answer < SILENCE_SECONDS

    def answers(self) -> bool:
        """True where the head answers now, or after a restart within SILENCE_SECONDS."""
        deadline = time.monotonic() + SILENCE_SECONDS
        while ask_head(self.address, self.token, ASK_SECONDS) == "silent":
            if time.monotonic() > deadline:
                return False
            time.sleep(0.5)
        return True


@contextmanager
def ray_cluster(launch: LaunchConfig) -> Iterator[Cluster]:
    """Connect this process to the configuration's Ray, starting one where it names none; disconnect, or end it.

    Call it in the main thread: a Ray of our own dies with the thread that started it. The handlers of signals stay as
    they are. Raises LaunchError where there is no such cluster, where its token is missing or wrong, or where it is
    open to other machines and that is not allowed.
    """
    assert threading.current_thread() is threading.main_thread()
    assert "ray" not in sys.modules, "Ray has read its environment already"
    address = launch.ray_address or os.environ.get("RAY_ADDRESS", "")
    with _own_ray(launch) if address in ("", "local") else _existing_ray(address, launch) as cluster:
        yield cluster


def num_worker_cpus(launch: LaunchConfig) -> int:
    """CPUs that Ray sets aside for one rank."""
    return launch.cpus_per_worker or launch.threads_per_worker or 1


@contextmanager
def _own_ray(launch: LaunchConfig) -> Iterator[Cluster]:
    token = secrets.token_hex(32)
    with private_folder() as folder:
        token_path = folder / "token"
        token_path.touch(0o600)
        token_path.write_text(token, "utf-8")
        settings = {**OF_OUR_RAY, "RAY_AUTH_TOKEN_PATH": str(token_path)}
        options = {
            "address": "local",
            # As many as the ranks need, whether this machine has them or not, and one for whatever else is started.
            "num_cpus": launch.num_workers * num_worker_cpus(launch) + 1,
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": False,
            "_node_ip_address": LOOPBACK,
            # Ray opens its folder to everybody, who could then put another token there: it is not the token's.
            "_temp_dir": str(folder / RAY_FOLDER),
        }
        # Ray would prefer this variable to the file.
        with changed_environment(settings, without=("RAY_AUTH_TOKEN", "RAY_ADDRESS")), _connected(**options) as context:
            yield Cluster(context.address_info["gcs_address"], True, LOOPBACK, token)


@contextmanager
def _existing_ray(address: str, launch: LaunchConfig) -> Iterator[Cluster]:
    if address == "auto":
        address = _address_on_this_machine()
    host, port = split_address(address)
    token = token_for(address, os.environ, launch.allow_open_cluster)
    settings = {**OF_ANY_RAY, "RAY_AUTH_MODE": "token" if token else "disabled"}
    if is_on_loopback(host, port):
        settings[KNOWN_BY_LOOPBACK] = "0"
    with changed_environment(settings), _connected(address=address) as context:
        yield Cluster(address, False, context.address_info["node_ip_address"], token)


def _address_on_this_machine() -> str:
    """The address of the Ray that runs here. Ray itself is asked, in a process of its own: see above."""
    code = "from ray._private.services import canonicalize_bootstrap_address as find; print(find('auto') or '')"
    # Its address is wanted as it stands: 127.0.0.1 is not another name of this machine's address on the network.
    environ = {**os.environ, KNOWN_BY_LOOPBACK: "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
    said = done.stdout.split()
    if done.returncode or not said:
        raise LaunchError(
            "launch.ray_address = auto: no Ray runs on this machine. Start one (`ray start --head`), name the head of "
            "one on other machines as host:port, or leave the key out for a Ray of the run's own."
        )
    return said[-1]


@contextmanager
def _connected(**options: Any) -> Iterator[Any]:
    """The context of `ray.init`. In the end disconnects, and waits for the processes that it had started."""
    import ray
    from ray._private import worker

    # What Ray warns of, dead workers and nodes, is said by the launcher, who knows what it means for the run.
    logging.getLogger("ray").setLevel(logging.ERROR)
    # Private, for want of a setting: else Ray prints the cluster's errors on stdout, a dead node's last lines too.
    worker.print_to_stdstream = lambda *_, **__: None
    is_own = options["address"] == "local"
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    if is_own:
        _leave_out_what_nobody_asks()
    try:
        context = _init(START_TRIES if is_own else 1, options)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    started = psutil.Process().children(recursive=True) if is_own else []
    try:
        yield context
    finally:
        # Workers, too: one that is left would go on writing into Ray's folder, which could not be removed then.
        started = _with_children(started)
        ray.shutdown()
        _end(started, SHUTDOWN_SECONDS)


def _leave_out_what_nobody_asks() -> None:
    """Have Ray start three processes less: its autoscaler, its dashboard, and what passes on the logs of workers.

    Each imports Ray before the first rank can start, and `ray.init` waits for the dashboard even where it has no pages.
    """
    from ray._private.node import Node

    # Private, for want of settings.
    Node.start_monitor = Node.start_log_monitor = lambda self: None
    Node.start_api_server = lambda self, **_: None


def _with_children(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    found = dict.fromkeys(processes)
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            found |= dict.fromkeys(process.children(recursive=True))
    return list(found)


def _init(tries: int, options: Mapping[str, Any]) -> Any:
    """Call `ray.init`, so often at most. Raises LaunchError."""
    import ray

    for number in range(1, tries + 1):
        before = psutil.Process().children(recursive=True)
        try:
            return ray.init(**options, log_to_driver=False, configure_logging=False)
        except Exception as error:  # Ray has no class of its own for what may go wrong here
            ray.shutdown()
            _end([process for process in psutil.Process().children(recursive=True) if process not in before])
            if number == tries:
                where = f"Ray at {options['address']}" if tries == 1 else "a Ray of the run's own"
                raise LaunchError(f"{where} could not be started or joined: {error}") from error
    raise AssertionError("a try returns or raises")


def _end(processes: Sequence[psutil.Process], seconds: float = 0.0) -> None:
    """Kill what has not ended by then, and wait for it."""
    left = psutil.wait_procs(list(processes), timeout=seconds)[1]
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=SHUTDOWN_SECONDS)
