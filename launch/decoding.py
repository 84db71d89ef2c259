"""Decoding over several ranks: this process leads, the others are forked from it and end with it."""

import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from launch.supervision.attempt import GRACE_SECONDS
from llmtrain.config.decoding import DecodingConfig
from llmtrain.config.reading.load import Schema, load_keys
from llmtrain.errors import LaunchError, LlmtrainError
from llmtrain.infer.model import FoundModel, TrainedModel, find_model, named_device
from llmtrain.messages import show_messages
from llmtrain.parallel.layout import plan_layout

if TYPE_CHECKING:
    from llmtrain.infer.sharded.ranks import RankLinks
    from llmtrain.models.transformer import Transformer


@contextmanager
def open_trained(path: Path, keys: Sequence[str], device: str) -> Iterator[TrainedModel]:
    """The model at a path, on as many ranks as keys such as `parallel.tensor=2` say.

    Without keys, or with one rank, all of it is in this process. Raises ConfigError for keys that do not fit, and
    LaunchError where another rank fails.
    """
    if not keys:
        yield find_model(path).read(named_device(device))
        return
    torch.set_num_threads(1)  # until ranks are forked: threads of the parent would be missing in them
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # so that the question does not initialize a GPU
    named_device(device)
    found = find_model(path)
    schema = Schema(DecodingConfig, DecodingConfig.problems)
    config = load_keys(path, keys, schema, {"model": found.config})
    if config.num_ranks == 1:
        yield found.read(named_device(device))
        return
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
        from llmtrain.infer.sharded.ranks import LeadingArena, tell_end

        assert decoding
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this machine
        gc.freeze()
        listener, ranks = socket.create_server((LOOPBACK, 0)), list[RankProcess]()
        port = listener.getsockname()[1]
        try:
            for rank in range(1, self.config.num_ranks):
                ranks.append(start_rank(self._place(rank, port), StopSignal(), [listener], self._work(rank, port)))
            store = serve_store(listener)
            with telling_failures(ranks):
                part, links, words = self._join(self._place(0, port))
                yield self.found.trained(part, lambda limits: LeadingArena(part, limits, links, words))
                tell_end(words)
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
        part = load_part(self.found, groups, parallel.pipeline_split, device)
        return part, RankLinks(groups), open_word_group()


@contextmanager
def telling_failures(ranks: Sequence[RankProcess]) -> Iterator[None]:
    """Where something fails because another rank has, raise LaunchError with that rank's reason."""
    try:
        yield
    except (RuntimeError, LlmtrainError) as error:
        failures, deadline = dict[int, Failure](), time.monotonic() + GRACE_SECONDS
        while len(failures) < len(ranks) and time.monotonic() < deadline:
            running = [place for place, each in enumerate(ranks) if each.rank not in failures]
            for news in LocalRankSet(ranks).news(running):
                failures[news.rank] = news.failure or Failure.of_exit(news.rank, news.exit_code or 0)
        if not failures:
            raise
        cause = first_cause([*failures.values(), Failure.of_error(0, error)])
        if cause.rank == 0:
            raise
        raise LaunchError(failure_text([cause]).removeprefix("error: ")) from error
