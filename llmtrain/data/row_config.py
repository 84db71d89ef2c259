"""The inputs of a run's rows beside samples: parameters of the objective, special tokens, pieces, random numbers."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmtrain.config.data import DataConfig
from llmtrain.config.schema import RunConfig
from llmtrain.config.sequence_lengths import Lengths, sample_lengths, shortest_lengths
from llmtrain.data.storage.targets import LabelsRecord
from llmtrain.data.stream import SampleStream
from llmtrain.values.keyed_hash import wide_key

SPACE_MARKS = {"sentencepiece": "\u2581", "byte_level": "\u0120\u010a\u0109\u010d"}
"""First characters of pieces that begin with a space; a byte-level tokenizer has others for new line, tab, return."""

CONTINUATION = "##"
"""WordPiece marks pieces that go on with a word instead."""


@dataclass(frozen=True)
class PieceTable:
    """Both are [vocab_size] of bool."""

    special: NDArray[np.bool_]
    begins_word: NDArray[np.bool_]


def word_begins(pieces: Iterable[str], style: str) -> NDArray[np.bool_]:
    """[pieces], true where a piece begins a word; `style` is sentencepiece, byte_level or wordpiece.

    White space begins a word and belongs to it, new lines too. `<0x0A>` stands for a byte.
    """
    if style == "wordpiece":
        return np.array([not piece.startswith(CONTINUATION) for piece in pieces], bool)
    marks = SPACE_MARKS[style]
    return np.array([_first(piece) in marks or _first(piece).isspace() for piece in pieces], bool)


def _first(piece: str) -> str:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return chr(int(piece[3:5], 16)) if piece[3:5] < "80" else "x"
    return piece[:1] or "x"


@lru_cache(maxsize=2)
def load_pieces(tokenizer: Path) -> PieceTable:
    """The table of a tokenizer. Raises ConfigError where it is missing, DataError where it is damaged."""
    from llmtrain.data.tokenizer import load_tokenizer  # its libraries are slow to import

    loaded = load_tokenizer(tokenizer)
    return PieceTable(loaded.special, word_begins(loaded.pieces, loaded.piece_style))


@dataclass(frozen=True)
class RowConfig:
    """Everything but the sample that a row of a batch depends on.

    Special tokens that the objective needs are filled in in `data`. `pieces` are those of the tokenizer; only `masked`
    and data.augment need them. `eos_id` ends what the objective puts together. Rows to train on are `augmented` where
    data.augment asks for it, rows to evaluate on never.
    """

    data: DataConfig
    seed: int
    eos_id: int
    family: str = "decoder"
    pieces: PieceTable | None = None
    bos_ids: tuple[int, ...] = ()
    """The ids that every document begins with."""
    end_ids: tuple[int, ...] = ()
    """The ids that end a turn of a conversation."""
    labels: LabelsRecord | None = None
    """The meaning of the data's labels, where it has some."""
    augmented: bool = False
    prompt_tokens: int = 0
    """Positions of a soft prompt before each sample."""

    @cached_property
    def lengths(self) -> Lengths:
        """The lengths of every row, padding included, without the prompt."""
        return sample_lengths(self.family, self.data)

    @cached_property
    def is_padded(self) -> "IsPadded":
        """It depends on the configuration alone, so that all batches of a run are of one kind."""
        shortest = shortest_lengths(self.data)
        encoder = shortest.encoder < self.lengths.encoder or self.data.augment.shortens
        return IsPadded(shortest.main < self.lengths.main, encoder)

    def draws(self, number: int, purpose: str = "objective") -> "SampleRandom":
        """The random numbers of one sample, by its global number."""
        # Counter-based, keyed by the sample: nothing depends on the samples that were drawn before.
        key = wide_key(purpose, self.seed, number)[:16]
        return SampleRandom(np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))))

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


def build_row_config(
    config: RunConfig, stream: SampleStream, tokenizer: Callable[[], Path], trained: bool = False
) -> RowConfig:
    """The row configuration of a run whose special tokens are filled in already; of rows to train on, or to evaluate.

    `tokenizer` finds the run's tokenizer; it is asked where the objective needs its pieces. Raises as `load_pieces`
    does.
    """
    augmented = trained and config.data.augment.is_on
    pieces = load_pieces(tokenizer()) if config.data.objective == "masked" or augmented else None
    known = (stream.bos_ids, stream.end_ids, stream.labels, augmented, config.prompt_tokens)
    return RowConfig(config.data, config.seed, stream.eos_id, config.model.family, pieces, *known)


@dataclass(frozen=True)
class IsPadded:
    """True where samples may be shorter than their rows."""

    main: bool
    encoder: bool


class SampleRandom:
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
