"""The one copy of the state that training waits for when a checkpoint is written behind it."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from llmtrain.values.fragment import Fragment


class HostCopy:
    """CPU memory for a copy of the state. It is kept between saves: new memory costs more than the copy itself."""

    def __init__(self) -> None:
        self._memory: dict[tuple[object, ...], Tensor] = {}

    def take(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        """The fragments with their data as it is now. They are valid until the next call."""
        copies = []
        on_device = False
        for fragment in fragments:
            source = fragment.tensor.detach()
            target = self._memory_for((fragment.kind, fragment.name, fragment.box), source)
            # Pinned memory takes copies of all tensors in one queue, with one wait at the end.
            target.copy_(source, non_blocking=source.is_cuda)
            on_device |= source.is_cuda
            copies.append(replace(fragment, tensor=target))
        if on_device:
            torch.cuda.synchronize()
        return copies

    def _memory_for(self, key: tuple[object, ...], source: Tensor) -> Tensor:
        known = self._memory.get(key)
        if known is None or known.dtype != source.dtype or known.shape != source.shape:
            known = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            self._memory[key] = known
        return known
