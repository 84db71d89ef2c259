"""The worker of each rank, and the numbers of ranks that a run may have. Pure: knows nothing of Ray."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from llmtrain.config.rules.arithmetic import arithmetic_problems
from llmtrain.config.schema import RunConfig
from llmtrain.parallel.layout import plan_layout


@dataclass(frozen=True)
class Seat:
    """A rank's worker: the number of its replica and its place among that one's workers, and the rank's place on its
    machine."""

    replica: int
    bundle: int
    local_rank: int
    local_world_size: int


def legal_sizes(config: RunConfig) -> list[int]:
    """The numbers of ranks that the run may have, from launch.num_workers down to launch.min_workers.

    All of them keep the model's layout; only the data parallel size differs.
    """
    replica, most = config.parallel.replica_size, config.launch.num_workers
    least = config.launch.min_workers or most
    sizes = range(most - most % replica, max(least, replica) - 1, -replica)
    return [size for size in sizes if not arithmetic_problems(config.with_keys({"launch.num_workers": size}), size)]


def seat_ranks(config: RunConfig, machines: Sequence[Sequence[str]]) -> list[Seat]:
    """The seat of each rank, by rank. `machines` names the machine of every worker, by replica.

    Replicas stay on neighbouring machines, and within a replica workers of one machine are neighbours: ranks of a
    tensor group, which talk most, share a machine wherever the workers allow it.
    """
    order = {machine: number for number, machine in enumerate(dict.fromkeys(chain.from_iterable(machines)))}
    replicas = sorted(range(len(machines)), key=lambda replica: min(order[machine] for machine in machines[replica]))
    bundles = [sorted(range(len(homes)), key=lambda bundle: order[homes[bundle]]) for homes in machines]
    layout = plan_layout(config.parallel, sum(map(len, machines)))
    sizes, taken = Counter(chain.from_iterable(machines)), Counter[str]()
    seats = []
    for rank in range(layout.world_size):
        place = layout.coordinates(rank)
        replica = replicas[place.data]
        bundle = bundles[replica][(place.pipeline * layout.context + place.context) * layout.tensor + place.tensor]
        machine = machines[replica][bundle]
        seats.append(Seat(replica, bundle, taken[machine], sizes[machine]))
        taken[machine] += 1
    return seats
