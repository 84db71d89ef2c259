"""Fill in the middle (Bavarian et al. 2022): parts of documents moved so that their middle comes last."""

import numpy as np
from numpy.typing import NDArray

from llmtrain.config.sequence_lengths import FIM_SENTINELS
from llmtrain.data.objectives.causal import PackedSample, causal_row
from llmtrain.data.row_config import Draws, Recipe
from llmtrain.data.stream import Sample

Tokens = NDArray[np.int64]


def fim(sample: Sample, recipe: Recipe) -> PackedSample:
    """Documents of the window are cut in three at random tokens with probability fim.rate; then as causal.

    PSM: <prefix> prefix <suffix> suffix <middle> middle. SPM: <prefix> <suffix> suffix <middle> prefix middle (the
    paper's second variant). The window keeps its length and documents their places: a document that is cut loses its
    last three tokens before its end of sequence, whose places the sentinels take. Each part of a document that lies in
    the window counts as a document; one of three tokens or less is left as it is.
    """
    draws = recipe.draws(sample.number)
    inside = sample.document_starts[sample.document_starts > 0]
    bounds = np.concatenate(([0], inside, [len(sample.tokens)]))
    parts = [_rearranged(part, recipe, draws) for part in np.split(sample.tokens, bounds[1:-1])]
    return causal_row(np.concatenate(parts), sample.document_starts, recipe.data)


def _rearranged(part: Tokens, recipe: Recipe, draws: Draws) -> Tokens:
    config = recipe.data.fim
    # As many draws for every part, so that what happens to one does not depend on those before it.
    cut, suffix_first, *places = draws.uniform(4).tolist()
    # What stands before every document stays there.
    begin = len(recipe.bos_ids) if tuple(part[: len(recipe.bos_ids)].tolist()) == recipe.bos_ids else 0
    head, part = part[:begin], part[begin:]
    length = len(part) - int(len(part) > 0 and part[-1] == recipe.eos_id)
    room = length - FIM_SENTINELS
    if room < 1 or cut >= config.rate:
        return np.concatenate((head, part))
    first, second = sorted(int(place * (room + 1)) for place in places)
    prefix, middle, suffix = part[:first], part[first:second], part[second:room]
    before, mid, behind = recipe.sentinels[:FIM_SENTINELS, None]
    if suffix_first < config.suffix_first_share:
        moved = (before, behind, suffix, mid, prefix, middle)
    else:
        moved = (before, prefix, behind, suffix, mid, middle)
    return np.concatenate((head, *moved, part[length:]))
