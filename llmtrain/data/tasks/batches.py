"""Texts to be scored, as micro-batches that an engine evaluates: in every layout, on each rank as many of one shape.

Shape suffixes: B micro-batch, S sequence, T the encoder's sequence in an encoder-decoder.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import lcm

import numpy as np
import torch

from llmtrain.config.schema import RunConfig
from llmtrain.data.objectives.causal import PackedSample, counted, stack_samples
from llmtrain.data.objectives.prompt import with_prompt
from llmtrain.data.tasks.tokens import ScoredText
from llmtrain.parallel.layout import Layout
from llmtrain.values.batch import IGNORED_LABEL, PADDING, Batch

SHORTEST = 16
"""Positions of the shortest rows. Others have twice as many, four times, ...: a compiler meets few shapes."""

FULL = 8
"""Micro-batches of a step for each pipeline stage: more would hardly shorten the time in which stages wait."""

BLANK = ScoredText((0,), 1, (0,))
"""Fills up the last step: nothing of it is scored, and it sees itself."""


@dataclass(frozen=True)
class Dealing:
    """How texts are dealt out to the ranks of a run.

    A micro-batch has `tokens` positions at most, or one text. Lengths are multiples of `parts`, the parts that ranks
    cut a sequence into. A step has at most `per_rank` micro-batches on each data-parallel rank, and a multiple of
    `round`, as interleaved pipeline stages want them.
    """

    tokens: int
    limit: int
    """Positions that the model knows, `prompt_tokens` of which a soft prompt takes."""
    prompt_tokens: int
    parts: int
    per_rank: int
    round: int
    dp_rank: int = 0
    dp_size: int = 1

    @staticmethod
    def of(config: RunConfig, layout: Layout, dp_rank: int) -> "Dealing":
        """Micro-batches as large as those of training, and steps that are no larger."""
        train = config.train
        return Dealing(
            tokens=train.micro_batch_size * (config.lengths.main + config.lengths.encoder),
            limit=config.model.max_seq_len,
            prompt_tokens=config.prompt_tokens,
            parts=layout.sequence_parts,
            # Enough to keep pipelines busy: each micro-batch has sums for all texts of its step.
            per_rank=min(train.global_batch_size // (train.micro_batch_size * layout.data), FULL * layout.pipeline),
            round=layout.pipeline if layout.virtual_pipeline > 1 else 1,
            dp_rank=dp_rank,
            dp_size=layout.data,
        )

    def padded(self, length: int) -> int:
        """The positions of rows of texts that have up to `length`."""
        padded = lcm(SHORTEST, self.parts)
        while padded < length:
            padded *= 2
        return min(padded, -(-self.limit // self.parts) * self.parts)


@dataclass(frozen=True)
class TextStep:
    """The texts of one step of an evaluation, over all ranks, by their places: so many rows in each micro-batch."""

    places: Sequence[int]
    rows: int
    length: int
    source_length: int
    """0: the model has no encoder."""
    micro_batches: int


def plan_steps(texts: Sequence[ScoredText], dealing: Dealing) -> Iterator[TextStep]:
    """All texts, the longest first: memory that suffices for the first step suffices for all."""
    order = sorted(range(len(texts)), key=lambda place: (-len(texts[place].source), -len(texts[place].ids), place))
    unit, prompt = dealing.dp_size * dealing.round, dealing.prompt_tokens
    while order:
        source = len(texts[order[0]].source)
        source_length = dealing.padded(source + prompt) if source else 0
        # The last id is only scored: nothing follows from it.
        longest = max(len(texts[place].ids) for place in order) - 1
        length = dealing.padded(longest + (0 if source else prompt))
        rows = max(1, min(dealing.tokens // (length + source_length), -(-len(order) // unit)))
        wanted = -(-len(order) // (rows * unit)) * unit
        micro_batches = min(wanted, dealing.per_rank * dealing.dp_size)
        count = rows * micro_batches
        yield TextStep(order[:count], rows, length, source_length, micro_batches)
        order = order[count:]


def step_batches(texts: Sequence[ScoredText], step: TextStep, dealing: Dealing) -> list[Batch]:
    """This rank's micro-batches of a step. A row's text has the number of its place in the step."""
    batches = []
    for number in range(dealing.dp_rank, step.micro_batches, dealing.dp_size):
        numbers = range(number * step.rows, (number + 1) * step.rows)
        is_text = [each < len(step.places) for each in numbers]
        chosen = [texts[step.places[each]] if there else BLANK for each, there in zip(numbers, is_text, strict=True)]
        batch = stack_samples([_row(text, step, dealing) for text in chosen], first_sample=0)
        told = [each if there else 0 for each, there in zip(numbers, is_text, strict=True)]
        batches.append(replace(batch, texts_B=torch.tensor(told), num_texts=len(step.places)))
    return batches


def _row(text: ScoredText, step: TextStep, dealing: Dealing) -> PackedSample:
    # Padding behind a text needs no mask: no position of a decoder sees what follows it.
    prompt, size = dealing.prompt_tokens, len(text.ids) - 1
    length = step.length - (0 if step.source_length else prompt)
    tokens_S, labels_S = np.zeros(length, np.int64), np.full(length, IGNORED_LABEL)
    tokens_S[:size], labels_S[text.first - 1 : size] = text.ids[:-1], text.ids[text.first :]
    positions_S, known = counted(length), dealing.limit - (0 if step.source_length else prompt)
    row = PackedSample(tokens_S, labels_S, positions_S if length <= known else np.minimum(positions_S, known - 1))
    if step.source_length:
        tokens_T = np.zeros(step.source_length - prompt, np.int64)
        tokens_T[: len(text.source)] = text.source
        segments_T = np.where(np.arange(len(tokens_T)) < len(text.source), 0, PADDING)
        row = replace(row, encoder_tokens_T=tokens_T, encoder_segments_T=segments_T)
    return with_prompt(row, prompt) if prompt else row
