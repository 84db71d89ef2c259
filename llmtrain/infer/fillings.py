"""What an encoder puts into the masks of a text.

Shape suffixes: B batch, S sequence, H hidden, M masks, K fillings, C a token and its probability.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llmtrain.infer.links import WHOLE, StageLinks, passed
from llmtrain.models.transformer import Transformer, counted_positions
from llmtrain.values.batch import ModelInputs


@dataclass(frozen=True)
class Filling:
    """An encoder's tokens for one mask with their probabilities, the likeliest first."""

    position: int
    tokens: list[tuple[int, float]]


@torch.no_grad()
def fill_masks(
    model: Transformer, tokens: Sequence[int], mask_id: int, count: int, links: StageLinks = WHOLE
) -> list[Filling]:
    """The `count` best fillings of each mask among tokens, which are at most as many as the model can read.

    Of a part of a model, which `links` join to the others, only what the leading rank finds says something.
    """
    tokens_BS = torch.tensor([list(tokens)], device=next(model.parameters()).device)
    places = [at for at, token in enumerate(tokens) if token == mask_id]
    count = min(count, model.config.vocabulary)
    hidden_SBH, _ = passed(model, ModelInputs(tokens_BS, counted_positions(tokens_BS)), links)
    found_MKC = hidden_SBH.new_empty(0, count, 2, dtype=torch.float64)
    if model.ends:
        best_MK = links.logits(model, hidden_SBH[places])[0].softmax(-1).topk(count)
        found_MKC = torch.stack((best_MK.indices.double(), best_MK.values.double()), -1)
    found = links.gathered(found_MKC, len(places)).tolist()  # the host waits here
    return [Filling(at, [(int(token), share) for token, share in best]) for at, best in zip(places, found, strict=True)]
