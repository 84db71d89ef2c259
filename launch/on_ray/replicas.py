"""Replicas of a served model on Ray Serve: started, asked, and ended.

Ray Serve keeps their number, starts new ones for those that die, and lets those that are not needed finish. Calls reach
them through Ray, which asks for the cluster's token; none of Serve's own servers of HTTP is started, or told of them.
"""

import asyncio
import logging
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.schema import ApplicationStatus, LoggingConfig

from launch.on_ray.cluster import Cluster
from launch.on_ray.served_model import ServedModel, TokenRouter
from launch.rank.signals import StopSignal
from llmtrain.errors import LaunchError, LlmtrainError, StoppedError
from llmtrain.infer.replicas.calls import AnswerHead, LostError, PassedCall
from llmtrain.infer.serving.opening import ServedSource

_logger = logging.getLogger(__name__)

BEAT_SECONDS = 2.0
ANSWER_SECONDS = 10.0
"""A replica that has not answered a beat within this does not count as ready."""

POLL_SECONDS = 1.0
"""Each question costs Ray Serve's controller about as much as a step of starting the replicas."""

MOST_CALLS = 100_000
"""Of a replica at a time, for Ray: the model's own queue says when it is full."""

CONTROLLER = {"name": "SERVE_CONTROLLER_ACTOR", "namespace": "serve"}
"""The actor by which Ray Serve is known on a cluster."""


@dataclass(frozen=True)
class Scale:
    """How many replicas, and what each of them has."""

    least: int
    most: int
    threads: int
    cpus: int
    on_gpu: bool
    drain_seconds: int
    timeout_seconds: float
    """Until the least number of them is ready."""


class RayReplicas:
    """See `llmtrain.infer.replicas.calls.Replicas`. As a context it keeps asking whether they live."""

    def __init__(self, handle: Any, least: int, cluster: Cluster) -> None:
        self._handle, self._cluster = handle, cluster
        self.longest, self.told = about(handle)
        """The longest text that may be asked for, and what is said about memory and kernels."""
        self._streaming = handle.options(method_name="answer", stream=True)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat_often, name="beats", daemon=True)
        self.num_ready, self.least = least, least
        self.cluster_is_lost = False

    def __enter__(self) -> "RayReplicas":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(ANSWER_SECONDS)

    async def ask(self, call: PassedCall) -> AsyncGenerator[AnswerHead | bytes, None]:
        """See `Replicas`."""
        response = self._streaming.remote(call)
        try:
            async for part in response:
                yield part
        except RayTaskError:
            raise  # a fault of ours, there
        except (RayError, RayServeException) as error:
            raise LostError(str(error)) from error
        finally:
            response.cancel()

    async def figures(self) -> Mapping[str, str]:
        """See `Replicas`."""
        found = await asyncio.to_thread(self._all, "figures")
        return dict(each for each in found if isinstance(each, tuple))

    def _all(self, method: str) -> list[Any]:
        """What all replicas return, or raise."""
        try:
            return self._handle.broadcast(method).results(timeout_s=ANSWER_SECONDS, return_exceptions=True)
        except (DeploymentUnavailableError, TimeoutError):
            return []

    def _beat_often(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with suppress(RayError, RayServeException):
                self.num_ready = sum(each is None for each in self._all("beat"))
            if not self._cluster.is_alive():
                self.cluster_is_lost, self.num_ready = True, 0
                return


@contextmanager
def open_replicas(source: ServedSource, scale: Scale, cluster: Cluster, stop: StopSignal) -> Iterator[RayReplicas]:
    """Replicas of a model that are ready; in the end, none.

    Raises LaunchError where there is no room for them or they die, what is wrong with the model, and StoppedError.
    """
    was_there = CONTROLLER in ray.util.list_named_actors(all_namespaces=True)
    logging_config = LoggingConfig(log_level="WARNING", enable_access_log=False)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    name = f"llmtrain-{uuid.uuid4().hex[:12]}"
    serve.start(proxy_location="Disabled", logging_config=logging_config)
    try:
        app = deployment_of(source.options.slots, scale).bind(source, scale.threads)
        target = serve.RunTarget(app, name=name, route_prefix=None, logging_config=logging_config)
        (handle,) = serve.run_many([target], wait_for_applications_running=False)
        wait_until_running(name, scale, stop)
        with RayReplicas(handle, scale.least, cluster) as replicas:
            yield replicas
    finally:
        # A Ray of our own ends right now, with everything on it.
        with suppress(RayError, RayServeException):
            if not cluster.own and cluster.answers():
                end(name, was_there)


def deployment_of(slots: int, scale: Scale) -> Any:
    """What Ray Serve is told about the replicas."""
    number: dict[str, Any] = {"num_replicas": scale.least}
    if scale.most > scale.least:
        number = {
            "autoscaling_config": {
                "min_replicas": scale.least,
                "max_replicas": scale.most,
                "target_ongoing_requests": slots,
            }
        }
    return serve.deployment(
        name="model",
        ray_actor_options={"num_cpus": scale.cpus, "num_gpus": int(scale.on_gpu)},
        max_ongoing_requests=MOST_CALLS,
        request_router_config=RequestRouterConfig(request_router_class=TokenRouter),  # pyright: ignore[reportArgumentType]
        graceful_shutdown_timeout_s=scale.drain_seconds,
        health_check_period_s=BEAT_SECONDS,
        **number,
    )(ServedModel)


def wait_until_running(name: str, scale: Scale, stop: StopSignal) -> None:
    """Wait for the least number of replicas. Raises LaunchError, and StoppedError."""
    deadline = time.monotonic() + scale.timeout_seconds
    while True:
        if stop.requested:
            raise StoppedError("told to stop before the replicas were ready")
        known = serve.status().applications.get(name)
        if known and known.status == ApplicationStatus.RUNNING:
            return
        said = " ".join(deployment.message for deployment in known.deployments.values()) if known else ""
        if known and known.status == ApplicationStatus.DEPLOY_FAILED:
            raise LaunchError(f"the replicas could not be started: {said}")
        if time.monotonic() > deadline:
            raise LaunchError(no_room(scale, said))
        time.sleep(POLL_SECONDS)


def no_room(scale: Scale, said: str) -> str:
    """The error of replicas that are not ready in time, in words."""
    has = ray.cluster_resources()
    each = f"{scale.cpus} CPU and 1 GPU" if scale.on_gpu else f"{scale.cpus} CPU"
    return (
        f"{scale.least} replicas with {each} each are not ready within launch.timeout_seconds = "
        f"{scale.timeout_seconds:g}; the cluster has {has.get('CPU', 0):g} CPU and {has.get('GPU', 0):g} GPU. "
        f"Ask for fewer, or give it more. {said}"
    ).strip()


def about(handle: Any) -> tuple[int, str]:
    """What a replica says about its model. Raises what is wrong with that."""
    try:
        return handle.about.remote().result(timeout_s=None)
    except RayTaskError as error:
        if isinstance(error.cause, LlmtrainError):
            raise error.cause from None
        raise LaunchError(f"a replica has failed: {str(error).strip().splitlines()[-1]}") from error
    except RayError as error:
        raise LaunchError(f"a replica has died at once: {str(error).strip().splitlines()[0]}") from error


def end(name: str, serve_was_there: bool) -> None:
    """End the replicas, and Ray Serve where it is not used by others and was started for them."""
    serve.delete(name)
    if not serve_was_there and not serve.status().applications:
        serve.shutdown()
