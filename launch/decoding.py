"""Decoding over several ranks: this process leads, the others are forked from it and end with it."""

import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from launch.forking.rank_process import LocalRankSet, RankProcess, start_rank
from launch.local import LOOPBACK
from launch.rank.cores import num_threads
from launch.rank.device import choose_device, start_threads
from launch.rank.failure import Failure, failure_text, first_cause
from launch.rank.place import Rank
from launch.rank.rendezvous import connect, open_group, serve_store
from launch.rank.signals import StopSignal
from launch.supervision.attempt import GRACE_SECONDS, POLL_SECONDS
from llmtrain.config.decoding import DecodingConfig
from llmtrain.config.reading.load import Schema, load_keys
from llmtrain.errors import ConfigError, LaunchError, LlmtrainError
from llmtrain.infer.model import FoundModel, TrainedModel, find_model, load_model, named_device
from llmtrain.infer.packed.choice import KernelChoice
from llmtrain.messages import show_messages
from llmtrain.parallel.layout import plan_layout

_logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from llmtrain.infer.sharded.ranks import RankLinks
    from llmtrain.models.transformer import Transformer


@contextmanager
def open_trained(
    path: Path,
    keys: Sequence[str],
    device: str,
    exact: bool = False,
    base: Path | None = None,
    kernels: KernelChoice | None = None,
) -> Iterator[TrainedModel]:
    """The model at a path, on as many ranks as keys such as `parallel.tensor=2` say; `exact` is what is asked of it,
    `base` as in `find_model`, `kernels` as in `FoundModel.read`.

    Without keys, or with one rank, all of it is in this process. Raises ConfigError for keys that do not fit, and
    LaunchError where another rank fails.
    """
    if not keys:
        yield load_model(path, named_device(device), base, kernels)
        return
    torch.set_num_threads(1)  # until ranks are forked: threads of the parent would be missing in them
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # so that the question does not initialize a GPU
    named_device(device)
    found = find_model(path, base)
    schema = Schema(DecodingConfig, DecodingConfig.problems)
    config = load_keys(path, keys, schema, {"model": found.config, "exact": exact})
    if config.num_ranks == 1:
        start_threads(num_threads(config.launch, 1))
        yield found.read(named_device(device), kernels)
        return
    if kernels is not None and kernels.kernels == "packed":
        raise ConfigError(
            "--kernels packed: the kernels multiply whole matrices, and ranks hold parts of them. Leave the keys of "
            "ranks out, or give auto or plain."
        )
    if found.matrices is not None:
        _logger.info("kernels: all matrices are dequantized: ranks hold parts of them")
    if found.rounded:
        raise ConfigError(
            f"{path}: rounds what goes into its matrices, by the largest input of a position, and ranks hold parts of "
            "these. Leave the keys of ranks out, or quantize with w8a16."
        )
    config = config.with_keys({"launch.device": device})
    with DecodingRanks(found, config).open() as trained:
        yield trained


@dataclass(frozen=True)
class DecodingRanks:
    """A model that is found, and the ranks that are to hold it."""

    found: FoundModel
    config: DecodingConfig

    @contextmanager
    def open(self) -> Iterator[TrainedModel]:
        """This rank's part as a model, whose batches run over all ranks."""
        from llmtrain.engines import decoding  # megatron-core: imported once, before ranks are forked
        from llmtrain.infer.sharded.ranks import LeadingRank

        assert decoding
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this machine
        gc.freeze()
        listener, ranks = socket.create_server((LOOPBACK, 0)), list[RankProcess]()
        port, failure = listener.getsockname()[1], Future[str]()
        try:
            for rank in range(1, self.config.num_ranks):
                ranks.append(start_rank(self._place(rank, port), StopSignal(), [listener], self._work(rank, port)))
            store = serve_store(listener)
            with RankWatch(ranks, failure).telling_failures() as watch:
                leader = LeadingRank(*self._join(self._place(0, port)), failure)
                yield self.found.trained(leader.part, leader)
                watch.stop()
                leader.end()
            del store  # not before: ranks talk through it
        finally:
            for each in ranks:
                each.end()
            if dist.is_initialized():
                dist.destroy_process_group()

    def _place(self, rank: int, port: int) -> Rank:
        world_size = self.config.num_ranks
        return Rank(rank, world_size, rank, world_size, LOOPBACK, port)

    def _work(self, rank: int, port: int) -> Callable[[], int]:
        def work() -> int:
            from llmtrain.infer.sharded.ranks import follow

            # What ends the command ends this process with it, behind what is on its way.
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            show_messages(rank)
            follow(*self._join(self._place(rank, port)))
            return 0

        return work

    def _join(self, place: Rank) -> "tuple[Transformer, RankLinks, dist.ProcessGroup]":
        """This rank's part, what joins it to the others, and the group that tells what to do."""
        from llmtrain.engines.decoding import decoding_groups, load_part
        from llmtrain.infer.sharded.ranks import RankLinks, open_word_group

        launch, parallel = self.config.launch, self.config.parallel
        start_threads(num_threads(launch, place.world_size))
        device = choose_device(launch, place)
        open_group(connect(place, launch.timeout_seconds), place, device, launch.timeout_seconds)
        groups = decoding_groups(plan_layout(parallel, place.world_size))
        words = open_word_group()  # before the weights: then the end of a rank that reads them is noticed at once
        part = load_part(self.found, groups, parallel.pipeline_split, device)
        dist.barrier(group=words)
        return part, RankLinks(groups), words


class RankWatch:
    """Hears the ends of ranks in a thread, and says the first of them to those who wait for `failure`."""

    def __init__(self, ranks: Sequence[RankProcess], failure: "Future[str]") -> None:
        self._ranks, self._failure = ranks, failure
        self._ended = dict[int, Failure]()
        self._stops = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="rank watch", daemon=True)

    @contextmanager
    def telling_failures(self) -> Iterator["RankWatch"]:
        """Watch. Where something fails because another rank has, raise LaunchError with that rank's reason."""
        self._thread.start()
        try:
            yield self
        except (RuntimeError, LlmtrainError) as error:
            if isinstance(error, LlmtrainError) and error.exit_code != LlmtrainError.exit_code:
                raise  # of what was asked
            deadline = time.monotonic() + GRACE_SECONDS
            while len(self._ended) < len(self._ranks) and time.monotonic() < deadline:
                self._thread.join(POLL_SECONDS)
            cause = first_cause([*self._ended.values(), Failure.of_error(0, error)])
            if cause.rank == 0:
                raise
            raise LaunchError(failure_text([cause]).removeprefix("error: ")) from error
        finally:
            self.stop()

    def stop(self) -> None:
        """From now on ranks may end."""
        self._stops.set()
        self._thread.join()

    def _listen(self) -> None:
        ranks = LocalRankSet(self._ranks)
        while not self._stops.is_set() and len(self._ended) < len(self._ranks):
            for news in ranks.news([at for at, each in enumerate(self._ranks) if each.rank not in self._ended]):
                found = news.failure or Failure.of_exit(news.rank, news.exit_code or 0)
                self._ended[news.rank] = found
                with suppress(InvalidStateError):  # it has been said already
                    self._failure.set_result(f"rank {found.rank} {found.summary}")
