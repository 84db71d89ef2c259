"""What the leading rank tells the others: limits, steps, works and the end, as whole numbers. Nothing else travels.

A list of numbers stands behind its length.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llmtrain.infer.batching.scheduler import BatchStep, DecodeRow, Limits, PromptChunk

END, NEW_BATCH, STEP, WORK = range(4)
"""The first number of a message: there is nothing more to do; forget all texts, from now on these limits hold; a step
to carry out; something else to do with the model."""


@dataclass(frozen=True)
class NumberReader:
    """Takes a message apart."""

    numbers: Iterator[int]

    def one(self) -> int:
        return next(self.numbers)

    def some(self) -> tuple[int, ...]:
        """A list behind its length."""
        return tuple(next(self.numbers) for _ in range(self.one()))


def limits_numbers(limits: Limits) -> list[int]:
    sizes = (limits.slots, limits.blocks, limits.max_seq_len, limits.chunk)
    return [NEW_BATCH, *sizes, limits.exact, limits.shares_prompts]


def read_limits(numbers: Sequence[int]) -> Limits:
    """From what `limits_numbers` has returned."""
    *sizes, exact, shares_prompts = numbers[1:]
    return Limits(*sizes, exact=bool(exact), shares_prompts=bool(shares_prompts))


def step_numbers(step: BatchStep) -> list[int]:
    numbers = [STEP, len(step.chunks)]
    for chunk in step.chunks:
        numbers += (chunk.request, chunk.slot, chunk.start, chunk.chooses)
        for each in (chunk.tokens, chunk.blocks, chunk.source, chunk.memory_blocks):
            numbers += (len(each), *each)
    for row in step.rows:
        numbers += (row.request, row.slot, row.token, row.position, row.chooses, row.memory_length)
        for each in (row.blocks, row.memory_blocks):
            numbers += (len(each), *each)
    numbers.insert(2, len(step.rows))
    return numbers


def read_step(numbers: Sequence[int]) -> BatchStep:
    """From what `step_numbers` has returned."""
    reader = NumberReader(iter(numbers))
    _, num_chunks, num_rows = reader.one(), reader.one(), reader.one()
    return BatchStep(tuple(_chunk(reader) for _ in range(num_chunks)), tuple(_row(reader) for _ in range(num_rows)))


def _chunk(reader: NumberReader) -> PromptChunk:
    request, slot, start, chooses = (reader.one() for _ in range(4))
    tokens, blocks = reader.some(), reader.some()
    source, memory_blocks = reader.some(), reader.some()
    return PromptChunk(request, slot, tokens, start, blocks, bool(chooses), source, memory_blocks)


def _row(reader: NumberReader) -> DecodeRow:
    request, slot, token, position = (reader.one() for _ in range(4))
    chooses, memory_length = reader.one(), reader.one()
    blocks, memory_blocks = reader.some(), reader.some()
    return DecodeRow(request, slot, token, position, blocks, bool(chooses), memory_length, memory_blocks)
