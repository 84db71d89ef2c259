"""Expert parallelism: rows travel to the ranks that hold their experts, and back (Lepikhin et al. 2021).

Shape suffixes: P rows that a rank sends, R rows that it receives, E experts, e those of one rank, H hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import all_to_all
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class ExpertExchange:
    """Expert number n is on rank n // (E / ranks) of the group. All ranks take part, with or without rows."""

    group: ProcessGroup

    def to_experts(self, x_PH: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """Rows for this rank's experts, expert by expert, how many each has, and the way back for as many rows.

        Rows are given expert by expert. The host waits for the numbers of rows.
        """
        ranks = self.group.size()
        sent_re = counts_E.view(ranks, -1)
        received_re = torch.empty_like(sent_re)
        # The numbers of rows first: nobody can make room for rows that he does not know of.
        dist.all_to_all_single(received_re, sent_re.contiguous(), group=self.group)
        # The host waits: the exchange takes the sizes of its parts as numbers of the host.
        sent, received = torch.stack((sent_re.sum(1), received_re.sum(1))).tolist()
        rows_RH = all_to_all(self.group, x_PH, received, sent)
        # They lie by sender and then by expert; wanted is by expert and then by sender.
        order_R = order_by_expert(received_re, sum(received))
        back_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))

        def back(done_RH: Tensor) -> Tensor:
            return all_to_all(self.group, done_RH[back_R], sent, received)

        return rows_RH[order_R], received_re.sum(0), back


def order_by_expert(counts_re: Tensor, num_rows: int) -> Tensor:
    """[R]: where each row stands now, in the order expert, sender. `counts_re` are rows by sender and expert."""
    num_experts = counts_re.shape[1]
    expert_R = torch.arange(num_experts, device=counts_re.device).repeat(counts_re.shape[0])
    return expert_R.repeat_interleave(counts_re.flatten(), output_size=num_rows).sort(stable=True).indices
