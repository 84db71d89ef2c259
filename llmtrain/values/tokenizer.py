"""A tokenizer as everybody sees it, whatever library is behind it, and what is known of it beside its own file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

MODEL_CONFIG, GENERATION = "config.json", "generation_config.json"
MODEL_FILES = (MODEL_CONFIG, GENERATION)
"""Files of a Hugging Face folder that speak of a model, not of its tokenizer."""

Around = tuple[tuple[int, ...], tuple[int, ...]]

PieceStyle = Literal["sentencepiece", "byte_level", "wordpiece"]
"""How pieces show where words begin; see data/row_config.py."""


@dataclass(frozen=True)
class TokenRoles:
    """Ids by their role, and the content of the files that said so.

    `eos_id` ends documents; generation stops at every one of `end_ids`. `bos_ids` stand in front of each text that the
    model sees; None: nobody says so. `absent` are roles that a file says no token has. `equal_sha256` are hashes of
    tokenizers that give the same ids as this one, as was proved. `notes` tell what of the files could not be used.
    """

    eos_id: int | None = None
    end_ids: tuple[int, ...] = ()
    bos_ids: tuple[int, ...] | None = None
    ids: Mapping[str, int] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    equal_sha256: tuple[str, ...] = ()
    files: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    names: Mapping[str, int] = field(default_factory=dict)
    """Names that reserved pieces were given, such as those of control tokens of a chat template; and the ids of new
    tokens above those of the tokenizer's file."""

    def as_trained(self, eos_id: int, bos_ids: tuple[int, ...]) -> "TokenRoles":
        """With the end and the begin that documents really have."""
        others = (token for token in self.end_ids if token not in (eos_id, self.eos_id))
        was = () if self.eos_id is None else (self.eos_id,)
        ends = dict.fromkeys((eos_id, *was, *others))
        return replace(self, eos_id=eos_id, end_ids=tuple(ends), bos_ids=bos_ids)

    def of_the_tokenizer(self) -> "TokenRoles":
        """Without the files that speak of a model, which another one may be trained with the same tokenizer."""
        return replace(self, files={name: said for name, said in self.files.items() if name not in MODEL_FILES})

    def with_model_of(self, other: "TokenRoles") -> "TokenRoles":
        """With the other's files that speak of a model, and the ends that they name."""
        said = {name: content for name, content in other.files.items() if name in MODEL_FILES}
        return replace(
            self, files={**self.files, **said}, end_ids=tuple(dict.fromkeys((*self.end_ids, *other.end_ids)))
        )


class Tokenizer(Protocol):
    """Turns text into ids below vocab_size and back. Special tokens are never produced from text."""

    path: Path
    sha256: str
    vocab_size: int
    eos_id: int
    bos_id: int | None
    pad_id: int | None
    mask_id: int | None
    cls_id: int | None
    sep_id: int | None
    piece_style: PieceStyle
    roles: TokenRoles
    """The roles that are named beside the tokenizer's file."""
    around: Around
    """Ids that the tokenizer itself puts before and behind a text."""

    @property
    def end_ids(self) -> tuple[int, ...]:
        """All ids at which a text ends; eos_id is the first."""
        ...

    @property
    def bos_ids(self) -> tuple[int, ...]:
        """Ids before every text that its model has seen."""
        ...

    @property
    def pieces(self) -> list[str]:
        """The text of each id as the tokenizer writes it; ids that it leaves out are empty."""
        ...

    @property
    def special(self) -> NDArray[np.bool_]:
        """[vocab_size], true where no text gives the id."""
        ...

    def special_id(self, name: str) -> int | None:
        """The id of a special token by its name, None where it is not one of them."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens. Raises DataError where the text is not valid Unicode."""
        ...

    @property
    def reads_names(self) -> bool:
        """True where `encode_with_offsets` can take what a text spells for the special token."""
        ...

    def encode_with_offsets(self, text: str, spelled: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a text, and the characters [begin, end) that each is of; several may be of one.

        With `spelled` special tokens that the text spells are those tokens.
        """
        ...

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[NDArray[Any]]:
        """The ids of each text as an integer array; the same for every number of threads."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens are left out."""
        ...
