"""Between text and token ids: one seam over sentencepiece models and Hugging Face's tokenizer.json files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import sentencepiece
import tokenizers
from numpy.typing import NDArray

from llmtrain.data.shards import TOKENIZER_NAMES, file_sha256
from llmtrain.errors import ConfigError, DataError

"""What a tokenizer is called beside the shards that were written with it."""

SPACE_MARK = "\u2581"
"""sentencepiece writes a space as this character, and so takes the character itself for a space."""

_MASK_NAMES = ("<mask>", "[MASK]", "<|mask|>")
_CLS_NAMES = ("<cls>", "[CLS]")
_SEP_NAMES = ("<sep>", "[SEP]")
_HF_SPECIALS = {
    "eos_id": ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]", "[SEP]"),
    "bos_id": ("<s>", "<|begin_of_text|>", "<bos>", "<|bos|>", "[BOS]", "[CLS]"),
    "pad_id": ("<pad>", "<|pad|>", "[PAD]"),
    "mask_id": _MASK_NAMES,
    "cls_id": _CLS_NAMES,
    "sep_id": _SEP_NAMES,
}
"""A tokenizer.json does not say which token ends a text: the first of these names that it has is taken."""


PieceStyle = Literal["sentencepiece", "byte_level", "wordpiece"]
"""How pieces show where words begin; see data/pieces.py."""


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

    @property
    def pieces(self) -> list[str]:
        """The text of each id as the tokenizer writes it; ids that it leaves out are empty."""
        ...

    @property
    def special(self) -> NDArray[np.bool_]:
        """[vocab_size], true where no text gives the id."""
        ...

    def special_id(self, name: str) -> int | None:
        """The id of a special token by its name, None where there is none such."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens. Raises DataError where the text is not valid Unicode."""
        ...

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[NDArray[Any]]:
        """The ids of each text as an integer array; the same for every number of threads."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens are left out."""
        ...


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a sentencepiece .model or a tokenizer.json. Raises ConfigError where it is missing, DataError if damaged."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file. Give a sentencepiece .model or a Hugging Face tokenizer.json.")
    return HuggingFaceTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)


def find_tokenizer(folder: str | Path) -> Path:
    """The tokenizer kept in a data set's folder or beside it. Raises ConfigError where there is none."""
    folder = Path(folder)
    candidates = [place / name for place in (folder, folder.absolute().parent) for name in TOKENIZER_NAMES]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise ConfigError(f"{folder}: neither it nor the folder above holds one of {', '.join(TOKENIZER_NAMES)}. Name one.")


class SentencePieceTokenizer:
    """A sentencepiece model. Those that `llmtrain data tokenizer` trains give back every text unchanged."""

    def __init__(self, path: Path) -> None:
        """Raises DataError where the file is no sentencepiece model or has no end of sequence."""
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(path.read_bytes())
        except RuntimeError as error:
            raise DataError(f"{path}: not a sentencepiece model ({error}). Copy the file again.") from None
        if self._model.eos_id() < 0:
            raise DataError(f"{path}: has no end-of-sequence piece, which documents need. Train one with eos_id >= 0.")
        self.path = path
        self.sha256 = file_sha256(path)
        self.vocab_size: int = self._model.get_piece_size()
        self.eos_id: int = self._model.eos_id()
        self.bos_id = _present(self._model.bos_id())
        self.pad_id = _present(self._model.pad_id())
        self.mask_id, self.cls_id, self.sep_id = map(self._first_of, (_MASK_NAMES, _CLS_NAMES, _SEP_NAMES))
        self.piece_style: PieceStyle = "sentencepiece"
        self._mark_ids = self._byte_ids_of_mark()

    @property
    def pieces(self) -> list[str]:
        return self._model.id_to_piece(list(range(self.vocab_size)))

    @property
    def special(self) -> NDArray[np.bool_]:
        model = self._model
        kinds = (model.is_control, model.is_unknown, model.is_unused)
        return np.array([any(kind(token) for kind in kinds) for token in range(self.vocab_size)], bool)

    def special_id(self, name: str) -> int | None:
        token = self._model.piece_to_id(name)
        return token if self._model.is_control(token) else None  # what users define comes from text as well

    def _first_of(self, names: Sequence[str]) -> int | None:
        return next((token for token in map(self.special_id, names) if token is not None), None)

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[NDArray[Any]]:
        texts = list(texts)
        try:
            batch = self._model.encode(texts, return_type="numpy", num_threads=num_threads)
        except (RuntimeError, TypeError, UnicodeEncodeError):
            raise _surrogate_error(texts) from None
        if self._mark_ids is not None:
            for number, text in enumerate(texts):
                if SPACE_MARK in text:
                    batch[number] = self._encode_around_marks(text, self._mark_ids)
        return batch

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(token) for token in ids])

    def _encode_around_marks(self, text: str, mark_ids: NDArray[Any]) -> NDArray[Any]:
        """The parts between marks as sentencepiece encodes them, and the bytes of each mark between them."""
        first, *others = self._model.encode(text.split(SPACE_MARK), return_type="numpy", num_threads=1)
        return np.concatenate([first, *(ids for part in others for ids in (mark_ids, part))])

    def _byte_ids_of_mark(self) -> NDArray[Any] | None:
        """The byte pieces of the mark, or None for a model that does not give a text back when it is joined by them."""
        pieces = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        if not all(self._model.is_byte(piece) for piece in pieces):
            return None
        part = self._model.encode("a")
        joined = self._model.decode([*part, *pieces, *part])
        return np.array(pieces, np.int32) if joined == f"a{SPACE_MARK}a" else None


class HuggingFaceTokenizer:
    """A tokenizer.json, run by the `tokenizers` library."""

    def __init__(self, path: Path) -> None:
        """Raises DataError where the file is no tokenizer or has no end-of-sequence token known by name."""
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise DataError(f"{path}: not a tokenizer.json ({error}). Copy the file again.") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # a text that spells a special token is ordinary text
        self.path = path
        self.sha256 = file_sha256(path)
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        eos_id = self._special("eos_id")
        if eos_id is None:
            names = ", ".join(_HF_SPECIALS["eos_id"])
            raise DataError(f"{path}: has no end-of-sequence token, which documents need; known names are {names}.")
        self.eos_id = eos_id
        self.bos_id = self._special("bos_id")
        self.pad_id = self._special("pad_id")
        self.mask_id, self.cls_id, self.sep_id = map(self._special, ("mask_id", "cls_id", "sep_id"))
        self.piece_style: PieceStyle = _piece_style(json.loads(self._tokenizer.to_str()))

    @property
    def pieces(self) -> list[str]:
        pieces = [""] * self.vocab_size
        for piece, token in self._tokenizer.get_vocab(with_added_tokens=True).items():
            pieces[token] = piece
        return pieces

    @property
    def special(self) -> NDArray[np.bool_]:
        """Ids that the tokenizer leaves out among them."""
        special = np.array([piece == "" for piece in self.pieces], bool)
        for token, added in self._tokenizer.get_added_tokens_decoder().items():
            special[token] |= added.special
        return special

    def special_id(self, name: str) -> int | None:
        token = self._tokenizer.token_to_id(name)
        added = self._tokenizer.get_added_tokens_decoder().get(token) if token is not None else None
        return token if added is not None and added.special else None

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[NDArray[Any]]:
        texts = list(texts)
        try:
            if num_threads == 1:  # one at a time: an encoding is a hundred times as large as its ids
                return [_ids(self._tokenizer.encode(text, add_special_tokens=False)) for text in texts]
            # The library shares a batch among all cores.
            return [_ids(encoding) for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        except (TypeError, UnicodeEncodeError):
            raise _surrogate_error(texts) from None

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)

    def _special(self, kind: str) -> int | None:
        found = (self._tokenizer.token_to_id(name) for name in _HF_SPECIALS[kind])
        return next((token for token in found if token is not None), None)


def _piece_style(tokenizer: Mapping[str, Any]) -> PieceStyle:
    """From the content of a tokenizer.json."""
    if tokenizer["model"].get("type") == "WordPiece":
        return "wordpiece"
    is_byte_level = "ByteLevel" in json.dumps([tokenizer.get("pre_tokenizer"), tokenizer.get("decoder")])
    return "byte_level" if is_byte_level else "sentencepiece"


def _ids(encoding: tokenizers.Encoding) -> NDArray[Any]:
    return np.array(encoding.ids, np.uint32)


def _present(token_id: int) -> int | None:
    """sentencepiece says -1 for a special piece that a model does not have."""
    return token_id if token_id >= 0 else None


def _surrogate_error(texts: Sequence[str]) -> DataError:
    """The error for the first text that UTF-8 cannot express."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return DataError(
                f"character {error.start} of a text is {text[error.start]!r}, half of a surrogate pair, which is no "
                "character of its own. Leave the text out or repair it."
            )
    raise AssertionError("the tokenizer refused a text that is valid Unicode")
