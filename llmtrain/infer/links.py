"""What joins the parts of a model that several processes hold, and one pass through a part.

Shape suffixes: B rows, S positions, H hidden, V vocabulary.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from llmtrain.models.stack import LayerCaches
from llmtrain.models.transformer import Transformer
from llmtrain.values.batch import ModelInputs


class StageLinks(Protocol):
    """What a part of a model needs of the parts that other processes hold."""

    def received(self, shape: tuple[int, int, int], device: torch.device) -> Tensor:
        """What the stage before has sent."""
        ...

    def send(self, hidden_SBH: Tensor) -> None:
        """Send to the next stage, which takes what is sent in the same order."""
        ...

    def logits(self, model: Transformer, hidden_SBH: Tensor) -> Tensor:
        """[B, S, V] in fp32 of a part that ends; all that hold a part of its head call it together."""
        ...

    def gathered(self, found: Tensor, rows: int) -> Tensor:
        """Behind some passes, the rows that the last stage has found, at the leading rank. Elsewhere as many rows that
        say nothing."""
        ...


class NoLinks:
    """The `StageLinks` of a model that is whole."""

    def received(self, shape: tuple[int, int, int], device: torch.device) -> Tensor:
        raise AssertionError("a whole model starts by itself")

    def send(self, hidden_SBH: Tensor) -> None:
        raise AssertionError("nothing follows a whole model")

    def logits(self, model: Transformer, hidden_SBH: Tensor) -> Tensor:
        return model.logits(hidden_SBH)

    def gathered(self, found: Tensor, rows: int) -> Tensor:
        assert len(found) == rows
        return found


WHOLE = NoLinks()


def passed(
    model: Transformer,
    inputs: ModelInputs,
    links: StageLinks,
    caches: Sequence[LayerCaches] | None = None,
    memory_TBH: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(what a model or a part of one puts out, which the next stage has been sent; what came from the one before)."""
    received = None
    if not model.starts:
        rows, length = inputs.tokens_BS.shape
        if model.has_memory:  # the encoder's positions go before the decoder's
            assert inputs.encoder_tokens_BT is not None
            length += inputs.encoder_tokens_BT.shape[1]
        received = links.received((length, rows, model.config.hidden_size), inputs.tokens_BS.device)
    hidden_SBH, _ = model(inputs, caches=caches, memory_TBH=memory_TBH, received=received)
    if not model.ends:
        links.send(hidden_SBH)
    return hidden_SBH, received
