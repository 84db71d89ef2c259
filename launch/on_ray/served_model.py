"""What Ray Serve runs for `llmtrain serve --replicas`: a replica of a served model, and who gets the next call.

Imported within `ray_cluster` only, and by the processes of replicas.
"""

import time
from collections.abc import AsyncIterator

import torch
from ray import serve
from ray.serve._private import replica as serve_replica
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from llmtrain.errors import LlmtrainError
from llmtrain.infer.model import load_model, named_device
from llmtrain.infer.packed.choice import KernelChoice
from llmtrain.infer.replicas.calls import AnswerHead, Balance, PassedCall
from llmtrain.infer.replicas.relay import relayed
from llmtrain.infer.serving.app import build_app
from llmtrain.infer.serving.opening import ServedSource
from llmtrain.messages import show_messages

ORPHANED_SECONDS = 60.0
"""Without a word from the command for so long, its replicas end: it has been killed, and could not end them itself."""


class ServedModel:
    """A replica. What is wrong with the model is said when it is asked for, so that Ray does not start it over."""

    def __init__(self, source: ServedSource, threads: int) -> None:
        # Private, for want of a setting: else a replica listens at all addresses of its machine, for calls by gRPC that
        # nobody makes.
        serve_replica.add_port_to_grpc_server = lambda server, address: 0  # pyright: ignore[reportPrivateImportUsage]
        show_messages(0)
        torch.set_num_threads(threads)
        context = serve.get_replica_context()
        self._application, self._name = context.app_name, context.replica_id.unique_id
        self._problem: LlmtrainError | None = None
        try:
            kernels = KernelChoice(source.kernels)
            trained = load_model(source.path, named_device(source.device), source.base, kernels)
            self._service, told = source.options.open(trained)
        except LlmtrainError as error:
            self._problem = error
            return
        # What is logged here goes into Ray's files, and the command tells its user this.
        self._told = "; ".join(filter(None, (told, trained.kernels)))
        # The key stays with the command, which asks for it: here it would stand in the cluster's memory.
        self._app = build_app(self._service, None)
        self._heard = time.monotonic()

    def about(self) -> tuple[int, str]:
        """The longest text that may be asked for, and what is said about memory and kernels. Raises LlmtrainError."""
        if self._problem is not None:
            raise self._problem
        return self._service.limits.max_tokens, self._told

    async def answer(self, call: PassedCall) -> AsyncIterator[AnswerHead | bytes]:
        """See `relayed`."""
        async for part in relayed(self._app, call, self._name):
            yield part

    def beat(self) -> None:
        """The command lives. Raises DeadError where the model does not."""
        self._heard = time.monotonic()
        self.check_health()

    def figures(self) -> tuple[str, str]:
        """This replica's name, and its figures."""
        return self._name, self._service.metrics.text().decode()

    def check_health(self) -> None:
        """Ray asks this now and then, and starts a replica anew that raises."""
        if self._problem is not None:
            return
        if time.monotonic() - self._heard > ORPHANED_SECONDS:
            serve.delete(self._application, _blocking=False)
        if self._service.batch.failure is not None:
            raise self._service.batch.failure


class TokenRouter(RequestRouter):
    """Sends a call to the replica with the fewest outstanding tokens. Lives in the process that calls."""

    def initialize_state(self, **_: object) -> None:
        """Called by Ray once the router is made."""
        self._balance = Balance()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The candidates, the best first. The call is the very object that the caller holds, and changes."""
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        call = pending_request.args[0] if pending_request and pending_request.args else None
        if not isinstance(call, PassedCall):
            return [candidate_replicas]
        return [[by_name[name]] for name in self._balance.order(call, list(by_name))]
