"""How likely a model finds texts, many at a time.

Shape suffixes: B texts, S sequence, T the encoder's sequence, N scored positions, H hidden, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from llmtrain.data.tasks.metrics import LogLikelihood
from llmtrain.data.tasks.tokens import ScoredText
from llmtrain.infer.links import WHOLE, StageLinks, passed
from llmtrain.models.transformer import Transformer, counted_positions
from llmtrain.values.batch import PADDING, ModelInputs

BATCH_TOKENS = 8192
"""Positions of a batch, padding included; a longer text is alone."""
_CHUNK_LOGITS = 1 << 24
"""Logits that are in memory at a time."""


@torch.no_grad()
def log_likelihoods(
    model: Transformer, texts: Sequence[ScoredText], batch_tokens: int = BATCH_TOKENS, links: StageLinks = WHOLE
) -> list[LogLikelihood]:
    """The log-likelihood of the scored ids of each text; what else is in its batch changes nothing but rounding.

    Texts stand behind the places of a soft prompt. Of a part of a model, which `links` join to the others, only what
    the leading rank finds says something.
    """
    found = list[LogLikelihood | None]([None] * len(texts))
    moe = model.config.moe
    if moe is not None and moe.router == "expert_choice":
        batch_tokens = 1  # experts choose among all tokens of a batch: texts would change each other
    for places in _batches(texts, batch_tokens):
        for place, score in zip(places, _scores(model, [texts[place] for place in places], links), strict=True):
            found[place] = score
    return [score for score in found if score is not None]


def _batches(texts: Sequence[ScoredText], batch_tokens: int) -> Iterator[list[int]]:
    """Places of texts that go together, the longest first: memory that suffices for the first batch suffices."""
    order = sorted(range(len(texts)), key=lambda place: (-_length(texts[place]), place))
    batch, length = list[int](), 0
    for place in order:
        length = length or _length(texts[place])
        if batch and (len(batch) + 1) * length > batch_tokens:
            yield batch
            batch, length = [], _length(texts[place])
        batch.append(place)
    if batch:
        yield batch


def _length(text: ScoredText) -> int:
    return max(len(text.ids), len(text.source))


def _scores(model: Transformer, texts: Sequence[ScoredText], links: StageLinks) -> list[LogLikelihood]:
    device = next(model.parameters()).device
    encodes = model.config.family == "encoder_decoder"
    # The last id is only scored: nothing follows from it.
    tokens_BS, _ = _padded([text.ids[:-1] for text in texts], device)
    source_BT = source_valid_BT = None
    if encodes:
        source_BT, source_valid_BT = _padded([text.source for text in texts], device)
    # Padding behind a text needs no mask: no position of a decoder sees what follows it.
    inputs = ModelInputs(
        tokens_BS,
        counted_positions(tokens_BS),
        encoder_tokens_BT=source_BT,
        encoder_segments_BT=None if source_valid_BT is None else torch.where(source_valid_BT, 0, PADDING),
    )
    hidden_SBH, _ = passed(model, inputs, links)
    found_BC = torch.zeros(len(texts) if model.ends else 0, 2, dtype=torch.float64, device=device)
    if model.ends:
        targets = [(row, at, text.ids[at]) for row, text in enumerate(texts) for at in range(text.first, len(text.ids))]
        row_N, at_N, token_N = torch.tensor(targets, device=device).reshape(-1, 3).unbind(1)
        hidden_NH = hidden_SBH[at_N - 1, row_N]
        size = max(1, _CHUNK_LOGITS // model.config.vocabulary)
        for chunk_NH, token_C, row_C in zip(*(each.split(size) for each in (hidden_NH, token_N, row_N)), strict=True):
            logits_NV = links.logits(model, chunk_NH[:, None])[0]
            logs_C = logits_NV.log_softmax(-1).gather(1, token_C[:, None])[:, 0]
            missed_C = logits_NV.argmax(-1) != token_C
            found_BC.index_add_(0, row_C, torch.stack((logs_C.double(), missed_C.double()), 1))
    rows = zip(texts, links.gathered(found_BC, len(texts)).tolist(), strict=True)  # the host waits here
    return [LogLikelihood(total, text.num_scored, missed == 0) for text, (total, missed) in rows]


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """([B, S] ids with zeros behind each row, [B, S] true where an id stands)."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    lengths_B1 = torch.tensor([[len(row)] for row in rows], device=device)
    return ids, torch.arange(longest, device=device) < lengths_B1
