"""One micro-batch as tensors.

Shape suffixes: B micro-batch, S sequence.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

IGNORED_LABEL = -100
"""A position with this label is no target: it adds neither to the loss nor to the count of valid tokens."""


@dataclass(frozen=True)
class Batch:
    """Token ids, the token that each position should predict, and where documents begin.

    `labels_BS` is already shifted: position s predicts labels[:, s]. `positions_BS` counts from 0 in every
    sample, or in every document where the configuration says so. `segments_BS` numbers the documents of a sample;
    it is None where attention runs across documents.
    """

    tokens_BS: Tensor
    labels_BS: Tensor
    positions_BS: Tensor
    segments_BS: Tensor | None = None
    first_sample: int = 0
    """Global number of the first sample; the others follow it, but for those that the run skips."""

    @property
    def num_valid_tokens(self) -> int:
        """Number of targets. Call on the CPU batch, before `to`: on a device it waits for the device."""
        return int((self.labels_BS != IGNORED_LABEL).sum())

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device; the copy does not wait where memory is pinned."""
        return replace(
            self,
            tokens_BS=self.tokens_BS.to(device, non_blocking=True),
            labels_BS=self.labels_BS.to(device, non_blocking=True),
            positions_BS=self.positions_BS.to(device, non_blocking=True),
            segments_BS=None if self.segments_BS is None else self.segments_BS.to(device, non_blocking=True),
        )
