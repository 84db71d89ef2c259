"""Sums of tensors over ranks."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_ELEMENTS = 1 << 24
"""fp32 gradients that are summed over ranks in one collective: 64 MiB."""


def sum_over_ranks(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Replace each tensor by its sum over the ranks, in buckets: one collective for many small tensors."""
    bucket: list[Tensor] = []
    for number, tensor in enumerate(tensors):
        bucket.append(tensor)
        if number == len(tensors) - 1 or sum(held.numel() for held in bucket) >= BUCKET_ELEMENTS:
            flat = torch.cat([held.reshape(-1) for held in bucket])
            dist.all_reduce(flat, group=group)
            for held, total in zip(bucket, flat.split([held.numel() for held in bucket]), strict=True):
                held.copy_(total.view_as(held))
            bucket = []
