"""What the rows of a run are made with: its objective's parameters, special tokens, and random numbers."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from llmtrain.config.schema import DataConfig, RunConfig
from llmtrain.config.sequence_lengths import Lengths, sample_lengths, shortest_lengths
from llmtrain.data.objectives.word_starts import PieceTable, load_pieces
from llmtrain.data.stream import SampleStream
from llmtrain.values.keyed_hash import wide_key


@dataclass(frozen=True)
class Recipe:
    """Everything but the sample that a row of a batch depends on.

    Special tokens that the objective needs are filled in in `data`. `pieces` are those of the tokenizer; only `masked`
    needs them. `eos_id` ends what the objective puts together.
    """

    data: DataConfig
    seed: int
    eos_id: int
    family: str = "decoder"
    pieces: PieceTable | None = None
    bos_ids: tuple[int, ...] = ()
    """What every document begins with."""

    @cached_property
    def lengths(self) -> Lengths:
        """Of every row, padding included."""
        return sample_lengths(self.family, self.data)

    @cached_property
    def is_padded(self) -> "IsPadded":
        """What depends on the configuration alone, so that all batches of a run are of one kind."""
        shortest = shortest_lengths(self.data)
        return IsPadded(shortest.main < self.lengths.main, shortest.encoder < self.lengths.encoder)

    def draws(self, number: int) -> "Draws":
        """The random numbers of one sample, by its global number."""
        key = wide_key("objective", self.seed, number)[:16]
        return Draws(np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))))

    @property
    def pad_id(self) -> int:
        pad = self.data.special_tokens.pad
        assert pad is not None, "data.special_tokens.pad is filled in before the run"
        return pad

    @property
    def mask_id(self) -> int:
        mask = self.data.special_tokens.mask
        assert mask is not None, "data.special_tokens.mask is filled in before the run"
        return mask

    @cached_property
    def sentinels(self) -> np.ndarray:
        sentinels = self.data.special_tokens.sentinels
        assert sentinels is not None, "data.special_tokens.sentinels are filled in before the run"
        return np.array(sentinels, np.int64)


def build_recipe(config: RunConfig, stream: SampleStream, tokenizer: Callable[[], Path]) -> Recipe:
    """That of a run in whose configuration special tokens are filled in already.

    `tokenizer` finds the run's tokenizer; it is asked where the objective needs its pieces. Raises as `load_pieces`
    does.
    """
    pieces = load_pieces(tokenizer()) if config.data.objective == "masked" else None
    return Recipe(config.data, config.seed, stream.eos_id, config.model.family, pieces, stream.bos_ids)


@dataclass(frozen=True)
class IsPadded:
    """Whether samples may be shorter than their rows."""

    main: bool
    encoder: bool


class Draws:
    """Uniform numbers and what is made of them here, so that a release of numpy that draws otherwise changes nothing.

    Only `random` of a counter-based generator is used: 53 bits of its output, in order.
    """

    def __init__(self, generator: np.random.Generator) -> None:
        self._generator = generator

    def uniform(self, size: int) -> np.ndarray:
        """[size] in [0, 1)."""
        return self._generator.random(size)

    def below(self, bound: int) -> int:
        """A whole number from 0 to bound - 1."""
        return int(self._generator.random() * bound)

    def order(self, size: int) -> np.ndarray:
        """A permutation of range(size)."""
        return np.argsort(self._generator.random(size), kind="stable")
