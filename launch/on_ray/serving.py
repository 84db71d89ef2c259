"""`llmtrain serve --replicas`: what is asked for is checked, Ray is started or joined, and a server put in front."""

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from starlette.applications import Starlette

from launch.on_ray.cluster import Cluster, num_worker_cpus, ray_cluster
from launch.rank.cores import num_threads
from launch.rank.signals import StopSignal
from llmtrain.config.launch import LaunchConfig
from llmtrain.config.rules.launch import HEAD, NO_HEAD
from llmtrain.errors import ConfigError, InstallationError, LaunchError
from llmtrain.infer.replicas.front import build_front
from llmtrain.infer.serving.opening import ServedSource
from llmtrain.words import counted

if TYPE_CHECKING:
    from launch.on_ray.replicas import Scale

_logger = logging.getLogger(__name__)

PACKAGES = ("fastapi", "grpc_reflection", "watchfiles")
"""What Ray Serve imports, beside what Ray does."""

MOST_REPLICAS = 1000
RANGE = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")


@dataclass(frozen=True)
class ReplicaOptions:
    """How many replicas, and where."""

    least: int
    most: int
    address: str | None = None
    """host:port of a Ray head, or auto; None: RAY_ADDRESS, else a Ray of the server's own."""
    allow_open_cluster: bool = False
    threads: int = 0
    """CPU threads of a replica; 0: its share of the cores."""
    drain_seconds: int = 60

    @classmethod
    def of(cls, text: str) -> "ReplicaOptions":
        """From `3`, or `1-4`: as many as are needed. Raises ConfigError."""
        found = RANGE.fullmatch(text)
        least = int(found[1]) if found else 0
        most = int(found[2] or least) if found else 0
        if not 1 <= least <= most <= MOST_REPLICAS:
            raise ConfigError(
                f"--replicas {text[:40]}: must be a number from 1 to {MOST_REPLICAS}, or two for as many as are needed "
                "between them, such as 1-4."
            )
        return cls(least, most)

    def launch(self, device: str) -> LaunchConfig:
        """The same as the section of a configuration, for a Ray with room for all replicas. Raises ConfigError."""
        keys = {"device": device, "ray_address": self.address, "allow_open_cluster": self.allow_open_cluster}
        keys |= {"num_workers": self.most, "threads_per_worker": self.threads}
        if self.address not in (None, "auto", "local") and not HEAD.fullmatch(self.address):
            raise ConfigError(f"--ray-address {self.address[:100]}: {NO_HEAD}")
        return LaunchConfig().with_keys(keys, "launch.")


def serve_replicas(
    served: ServedSource, asked: ReplicaOptions, key: str | None, run: Callable[[Starlette, Callable[[], bool]], None]
) -> None:
    """Serve with `run`, which returns when it was told to stop, or when what it is given says that all has failed.

    Raises InstallationError where Ray Serve is not there, LaunchError where Ray or the replicas cannot be started or
    the cluster is lost, ConfigError and others for what is wrong with the model.
    """
    require_ray_serve()
    launch = asked.launch(served.device)
    if not launch.threads_per_worker:
        launch = launch.with_keys({"threads_per_worker": num_threads(launch, asked.most)})
    os.environ["RAY_SERVE_LOG_TO_STDERR"] = "0"  # what is to know is said here; Serve's words are in its files
    stop = StopSignal("the replicas are ended", "and what they are doing is lost")
    with stop, options_named(), ray_cluster(launch) as cluster:
        # Ray reads its environment when it is imported, which is right now only.
        from launch.on_ray.replicas import open_replicas

        scale = scale_of(asked, launch, cluster)
        with open_replicas(served.at_absolute_paths(), scale, cluster, stop) as replicas:
            _logger.info("%s", ", each with ".join(filter(None, [counted(asked.least, "replica"), replicas.told])))
            limits = replace(served.options.limits, max_tokens=replicas.longest)
            run(build_front(replicas, limits, key), lambda: replicas.cluster_is_lost)
            if replicas.cluster_is_lost:
                raise LaunchError(f"the head of the Ray cluster at {cluster.address} does not answer any more.")


def require_ray_serve() -> None:
    """Raises InstallationError that names what is missing."""
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise InstallationError(f"--replicas: Ray Serve needs {', '.join(missing)}: pip install 'llmtrain[replicas]'.")


def scale_of(asked: ReplicaOptions, launch: LaunchConfig, cluster: Cluster) -> "Scale":
    """What a replica gets on the cluster that there is. Raises LaunchError where it has no GPU and one is asked for."""
    import ray

    from launch.on_ray.replicas import Scale

    gpus = ray.cluster_resources().get("GPU", 0)
    if launch.device == "cuda" and not gpus:
        raise LaunchError(f"--device cuda: the Ray cluster at {cluster.address} has no GPU.")
    return Scale(
        asked.least,
        asked.most,
        launch.threads_per_worker,
        num_worker_cpus(launch),
        on_gpu=launch.device != "cpu" and gpus > 0,
        drain_seconds=asked.drain_seconds,
        timeout_seconds=launch.timeout_seconds,
    )


@contextmanager
def options_named() -> Iterator[None]:
    """Errors about a Ray cluster name the options of the command: runs have them as keys."""
    try:
        yield
    except LaunchError as error:
        text = str(error).replace("launch.ray_address = ", "--ray-address ")
        text = text.replace("launch.allow_open_cluster=true", "--allow-open-cluster")
        raise LaunchError(text) from error
