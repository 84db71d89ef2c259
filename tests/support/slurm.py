"""A real Slurm of two nodes on this machine, for tests: started in a folder of its own, and stopped with all its jobs.

It needs Debian's packages (PACKAGES), which root gets with apt-get where there is one, and root, because slurmd
starts tasks as the job's user.
"""

import fcntl
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "munged")
NODES = ("n1", "n2")
CPUS_PER_NODE = 4
TIMEOUT_SECONDS = 300
OUTPUT = "daemons.txt"

# Nothing here belongs to the machine: own ports, own key, own folders. The nodes say that they have more cores than
# there are, so that ranks fit. linuxproc finds the processes of a step by their parents and needs no control groups. A
# requeued job waits until its credential has expired.
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1
ReturnToService=2
MpiDefault=none
KillWait=10
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=4000 State=UNKNOWN\n"
PARTITION = "PartitionName=debug Nodes={names} Default=YES MaxTime=INFINITE State=UP\n"


class NoSlurmError(Exception):
    """Slurm cannot be had here; the text says why."""


@dataclass(frozen=True)
class Slurm:
    """A running cluster. `environment` is what a user of it has."""

    folder: Path
    environment: dict[str, str]

    def run(self, *line: str, folder: Path | None = None) -> str:
        """What a command of Slurm prints; fails where the command does."""
        done = subprocess.run(
            line, env=self.environment, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
        assert done.returncode == 0, f"{line}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def facts(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, ExitCode (code:signal), Restarts, ..."""
        words = self.run("scontrol", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, condition: Callable[[dict[str, str]], bool]) -> dict[str, str]:
        """Wait until what is known about a job fulfils a condition; returns that."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not condition(facts := self.facts(job)):
            assert time.monotonic() < deadline, facts
            time.sleep(0.1)
        return facts

    def wait_for_end(self, job: str) -> dict[str, str]:
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        return self.wait(job, lambda facts: facts["JobState"] in ended)


@contextmanager
def running_slurm() -> Iterator[Slurm]:
    """A cluster of NODES that lasts as long as the context. Raises NoSlurmError where there can be none."""
    _require_packages()
    # A socket's path is short.
    folder = Path(mkdtemp(prefix="slurm-"))
    folder.chmod(0o711)  # munge wants its socket to be within everybody's reach
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    daemons: list[subprocess.Popen[bytes]] = []
    slurm = Slurm(folder, environment)

    def wait_until(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not condition():
            ended = any(daemon.poll() is not None for daemon in daemons)
            assert not ended and time.monotonic() < deadline, (folder / OUTPUT).read_text("utf-8", "replace")
            time.sleep(0.1)

    try:
        _configure(folder)
        daemons.append(_start_munge(folder))
        wait_until((folder / "munge.socket").exists)
        daemons.append(_start(folder, "slurmctld", "-D"))
        daemons += [_start(folder, "slurmd", "-D", "-N", node) for node in NODES]
        wait_until(lambda: slurm.run("sinfo", "-h", "-o", "%D %t") == f"{len(NODES)} idle")
        yield slurm
        slurm.run("scancel", "--full", "--state=RUNNING", "--signal=KILL", "--user=root")
        slurm.run("scancel", "--user=root")
        wait_until(lambda: slurm.run("squeue", "-h") == "")
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _require_packages() -> None:
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        raise NoSlurmError("a Slurm for tests needs Linux and root: its daemons start tasks as the job's user")
    with Path(__file__).open() as lock:  # of test processes side by side, one installs: apt-get does not wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not all(shutil.which(program) for program in PROGRAMS):
            _install_packages()


def _install_packages() -> None:
    if not shutil.which("apt-get"):
        raise NoSlurmError(f"Slurm is not installed, nor apt-get, which would install {' '.join(PACKAGES)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "--yes", "--quiet", "--no-install-recommends", *PACKAGES]
    for line in (["apt-get", "update", "--quiet"], install):
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode != 0:
            raise NoSlurmError(f"`{' '.join(line)}` failed: {done.stderr.strip()[-300:]}")


def _configure(folder: Path) -> None:
    host = socket.gethostname().partition(".")[0]
    ports = _free_ports(1 + len(NODES))
    text = CONF.format(folder=folder, host=host, control_port=ports[0])
    for name, port in zip(NODES, ports[1:], strict=True):
        text += NODE.format(name=name, host=host, port=port, cpus=CPUS_PER_NODE)
        (folder / f"spool-{name}").mkdir()
    (folder / "state").mkdir()
    (folder / "slurm.conf").write_text(text + PARTITION.format(names=",".join(NODES)), "utf-8")


def _start_munge(folder: Path) -> subprocess.Popen[bytes]:
    """munged with a key of its own, which ends with this cluster."""
    key = folder / "munge.key"
    key.touch(0o600)
    key.write_bytes(os.urandom(128))
    places = {"key-file": key, "socket": folder / "munge.socket", "pid-file": folder / "munge.pid"}
    places |= {"log-file": folder / "munge.log", "seed-file": folder / "munge.seed"}
    options = [f"--{name}={place}" for name, place in places.items()]
    return _start(folder, "munged", "--foreground", *options)


def _start(folder: Path, *line: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    with (folder / OUTPUT).open("ab") as output:
        return subprocess.Popen(line, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports
