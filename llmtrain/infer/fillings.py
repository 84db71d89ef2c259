"""What an encoder puts into the masks of a text.

Shape suffixes: B batch, S sequence, K fillings.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llmtrain.errors import ConfigError
from llmtrain.models.transformer import Transformer, counted_positions
from llmtrain.values.batch import ModelInputs


@dataclass(frozen=True)
class Filling:
    """An encoder's tokens for one mask with their probabilities, the likeliest first."""

    position: int
    tokens: list[tuple[int, float]]


@torch.no_grad()
def fill_masks(model: Transformer, tokens: Sequence[int], mask_id: int, count: int) -> list[Filling]:
    """The `count` best fillings of each mask. Raises ConfigError for tokens without a mask, or too many of them."""
    if not 0 < len(tokens) <= model.config.max_seq_len:
        raise ConfigError(
            f"The prompt has {len(tokens)} tokens: give it at least 1 and at most {model.config.max_seq_len} "
            "(model.max_seq_len)."
        )
    if mask_id not in tokens:
        raise ConfigError("The prompt has no mask to fill.")
    tokens_BS = torch.tensor([list(tokens)], device=next(model.parameters()).device)
    hidden_SBH, _ = model(ModelInputs(tokens_BS, counted_positions(tokens_BS)))
    # The host waits for the device at the first mask below.
    best_SK = model.logits(hidden_SBH)[0].softmax(-1).topk(min(count, model.config.vocabulary))
    return [
        Filling(at, list(zip(best_SK.indices[at].tolist(), best_SK.values[at].tolist(), strict=True)))
        for at, token in enumerate(tokens)
        if token == mask_id
    ]
