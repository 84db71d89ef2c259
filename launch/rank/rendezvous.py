"""The rendezvous of a run's ranks: a store of small texts, and the group whose collectives carry tensors."""

import socket
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

# They are documented, but torch does not list them among its exports.
from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from launch.rank.place import Rank
from llmtrain.errors import LaunchError


@dataclass(frozen=True)
class TorchRankStore:
    """The ranks' store as llmtrain.checkpoint.agreement.RankStore: a connection of its own, so that it may wait."""

    store: Store
    rank: int
    world_size: int
    timeout_seconds: float

    def put(self, key: str, text: str) -> None:
        self.store.set(key, text)

    def get(self, key: str) -> str:
        try:
            return self.store.get(key).decode()
        except dist.DistStoreError as error:
            raise LaunchError(
                f"rank {self.rank}: no other rank said {key!r} within launch.timeout_seconds = "
                f"{self.timeout_seconds:g}. The logs of the other ranks say why: {error}"
            ) from error
        except dist.DistNetworkError as error:
            raise LaunchError(f"rank {self.rank}: the ranks' store is gone: {error}") from error


def connect(place: Rank, timeout_seconds: float) -> TCPStore:
    """This rank's connection to the store; serves it where the place says so. Raises LaunchError where none answers."""
    try:
        return TCPStore(
            place.host,
            place.port,
            is_master=place.serves_store,
            timeout=timedelta(seconds=timeout_seconds),
            wait_for_workers=False,
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        doing = "serve" if place.serves_store else "reach"
        raise LaunchError(
            f"{place} cannot {doing} the ranks' store at {place.host}:{place.port} within "
            f"launch.timeout_seconds = {timeout_seconds:g}: {error}"
        ) from error


def serve_store(listener: socket.socket) -> TCPStore:
    """The store on a socket that already listens, which it takes over; it lasts as long as what is returned."""
    host, port = listener.getsockname()
    return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def lone_store() -> Store:
    """The store of a single rank."""
    return HashStore()


def open_rank_store(place: Rank, timeout_seconds: float) -> TorchRankStore:
    """The texts of this attempt. Open it after `connect`, which serves the store.

    A connection of its own: a rank that waits for a text holds its connection, and the group needs one.
    """
    # Prefixes, since an outer launcher's store may outlive an attempt: old keys would be taken for this attempt's.
    store = PrefixStore(f"attempt-{place.attempt}/said", connect(replace(place, serves_store=False), timeout_seconds))
    return TorchRankStore(store, place.rank, place.world_size, timeout_seconds)


def open_group(store: Store, place: Rank, device: torch.device, timeout_seconds: float) -> None:
    """Make all ranks the default process group: gloo for tensors on the CPU, nccl for those on GPUs."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=PrefixStore(f"attempt-{place.attempt}/group", store),
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(seconds=timeout_seconds),
        device_id=device if on_gpu else None,
    )


def anybody(flag: bool) -> bool:
    """True where the flag is set on any rank; one small collective on the CPU, which no device waits for.

    All ranks leave the loop at the same step: one that stopped alone would leave the others in a collective.
    """
    told = torch.tensor(int(flag))
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return bool(told)
