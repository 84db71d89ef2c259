"""Between text and token ids: one seam over sentencepiece models and Hugging Face's tokenizer.json files."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from numpy.typing import NDArray

from llmtrain.data.storage.manifest import LONGEST_TOKENIZER, TOKENIZER_NAMES, file_sha256
from llmtrain.data.token_roles import MODEL_CONFIG, TOKENIZER_CONFIG, Lookup, read_settings, roles_beside
from llmtrain.errors import ConfigError, DataError
from llmtrain.files import read_bytes
from llmtrain.values.tokenizer import Around, PieceStyle, Tokenizer, TokenRoles

SPACE_MARK = "\u2581"
"""sentencepiece writes a space as this character, and so takes the character itself for a space."""

_MASK_NAMES = ("<mask>", "[MASK]", "<|mask|>")
_CLS_NAMES = ("<cls>", "[CLS]")
_SEP_NAMES = ("<sep>", "[SEP]")
_HF_SPECIALS = {
    "eos": ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]", "[SEP]"),
    "bos": ("<s>", "<|begin_of_text|>", "<bos>", "<|bos|>", "[BOS]", "[CLS]"),
    "pad": ("<pad>", "<|pad|>", "[PAD]"),
    "mask": _MASK_NAMES,
    "cls": _CLS_NAMES,
    "sep": _SEP_NAMES,
}
"""Names by role. The first one among the added tokens is taken where neither the files beside a tokenizer.json nor the
ids that it puts around a text name a token. Ordinary pieces of these names do not count."""


class UnknownEndError(DataError):
    """A tokenizer of which nothing says which token ends a text."""


def load_tokenizer(path: str | Path, said: Path | TokenRoles | None = None) -> Tokenizer:
    """Load a sentencepiece .model or a tokenizer.json, and what is said of it in files beside it.

    `said` takes the place of those files: a settings file, or its content. Raises ConfigError where the tokenizer is
    missing, DataError if it is damaged.
    """
    path = Path(path)
    if not path.is_file():
        near = next((path / name for name in TOKENIZER_NAMES if (path / name).is_file()), None)
        what = f"is a folder. Try {near}." if near else "is a folder." if path.is_dir() else "no such file."
        raise ConfigError(f"{path}: {what} Give a sentencepiece .model or a Hugging Face tokenizer.json.")
    kind = HuggingFaceTokenizer if path.suffix == ".json" else SentencePieceTokenizer
    return kind(path, said)


def tokenizer_content(path: Path) -> bytes:
    """The bytes of a tokenizer's file. Raises ConfigError where it is missing, DataError where it cannot be read."""
    try:
        return read_bytes(path, LONGEST_TOKENIZER)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such tokenizer. Name a sentencepiece .model or a tokenizer.json.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


class SentencePieceTokenizer:
    """A sentencepiece model. Those that `llmtrain data tokenizer` trains give back every text unchanged."""

    def __init__(self, path: Path, said: Path | TokenRoles | None = None) -> None:
        """Raises DataError where the file is not a sentencepiece model or has no end of sequence."""
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(tokenizer_content(path))
        except (RuntimeError, ValueError) as error:  # ValueError: its own message holds bytes of the file
            raise DataError(f"{path}: not a sentencepiece model ({error}). Copy the file again.") from None
        self.path = path
        self.sha256 = file_sha256(path)
        self.vocab_size: int = self._model.get_piece_size()
        self.roles = _roles(self, said, self._id_of)
        self._own_size, self.vocab_size = self.vocab_size, _grown(self.vocab_size, self.roles)
        own = {"eos": self._model.eos_id(), "bos": self._model.bos_id(), "pad": self._model.pad_id()}
        ids = {role: token for role, token in own.items() if token >= 0}  # -1: the model has none such
        for role, names in (("mask", _MASK_NAMES), ("cls", _CLS_NAMES), ("sep", _SEP_NAMES)):
            known = [token for token in map(self.special_id, names) if token is not None]
            if known:
                ids[role] = known[0]
        ids = {role: token for role, token in ids.items() if role not in self.roles.absent} | dict(self.roles.ids)
        eos_id = ids.get("eos", own["eos"]) if self.roles.eos_id is None else self.roles.eos_id
        if eos_id < 0:
            raise DataError(f"{path}: has no end-of-sequence piece, which documents need. Train one with eos_id >= 0.")
        self.eos_id: int = eos_id
        self.bos_id, self.pad_id = ids.get("bos"), ids.get("pad")
        self.mask_id, self.cls_id, self.sep_id = ids.get("mask"), ids.get("cls"), ids.get("sep")
        self.around = _around_by_flags(self.roles, self.bos_id, self.eos_id) or ((), ())
        self.piece_style: PieceStyle = "sentencepiece"
        self._mark_ids = self._byte_ids_of_mark()

    @property
    def end_ids(self) -> tuple[int, ...]:
        return _end_ids(self)

    @property
    def bos_ids(self) -> tuple[int, ...]:
        return _bos_ids(self)

    @property
    def pieces(self) -> list[str]:
        return _renamed(self._model.id_to_piece(list(range(self._own_size))), self.roles)

    @property
    def special(self) -> NDArray[np.bool_]:
        model = self._model
        kinds = (model.is_control, model.is_unknown, model.is_unused)
        found = [any(kind(token) for kind in kinds) for token in range(self._own_size)]
        return np.array(found + [True] * (self.vocab_size - self._own_size), bool)

    def special_id(self, name: str) -> int | None:
        if name in self.roles.names:
            return self.roles.names[name]
        token = self._model.piece_to_id(name)
        if token in self.roles.names.values():
            return None  # it has another name now
        return token if self._model.is_control(token) else None  # what users define comes from text as well

    def _id_of(self, name: str) -> int | None:
        token = self._model.piece_to_id(name)
        return token if self._model.id_to_piece(token) == name else None  # unknown names have the id of <unk>

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
                    # The parts between marks as sentencepiece encodes them, and the bytes of each mark between them.
                    first, *others = self._model.encode(text.split(SPACE_MARK), return_type="numpy", num_threads=1)
                    rest = (ids for part in others for ids in (self._mark_ids, part))
                    batch[number] = np.concatenate([first, *rest])
        return batch

    reads_names = False

    def encode_with_offsets(self, text: str, spelled: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        assert not spelled
        ids, offsets = list[int](), list[tuple[int, int]]()
        for number, part in enumerate(text.split(SPACE_MARK) if self._mark_ids is not None else [text]):
            place = offsets[-1][1] if offsets else 0
            if number and self._mark_ids is not None:
                ids += self._mark_ids.tolist()
                offsets += [(place, place + 1)] * len(self._mark_ids)
                place += 1
            try:
                pieces = self._model.encode(part, return_type="proto").pieces
            except (RuntimeError, TypeError, UnicodeEncodeError):
                raise _surrogate_error([part]) from None
            ids += [piece.id for piece in pieces]
            offsets += [(place + begin, place + end) for begin, end in _of_characters(part, pieces)]
        return ids, offsets

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(token) for token in ids if token < self._own_size])

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

    def __init__(self, path: Path, said: Path | TokenRoles | None = None) -> None:
        """Raises DataError where the file is not a tokenizer, or where nothing says which token ends a text."""
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(tokenizer_content(path))
        except DataError:
            raise
        except Exception as error:  # the library raises nothing narrower
            raise DataError(f"{path}: not a tokenizer.json ({error}). Copy the file again.") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # a text that spells a special token is ordinary text
        self.path = path
        self.sha256 = file_sha256(path)
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.roles = _roles(self, said, self._tokenizer.token_to_id)
        self._own_size, self.vocab_size = self.vocab_size, _grown(self.vocab_size, self.roles)
        behind = self._put_around()[1]
        ids = {role: token for role in _HF_SPECIALS if (token := self._special(role)) is not None}
        eos_id = self.roles.eos_id
        if eos_id is None:
            eos_id = self._unsaid_end(behind, ids)
        self.eos_id = eos_id
        self.bos_id, self.pad_id = ids.get("bos"), ids.get("pad")
        self.mask_id, self.cls_id, self.sep_id = ids.get("mask"), ids.get("cls"), ids.get("sep")
        self.around = _around_by_flags(self.roles, self.bos_id, self.eos_id) or self._put_around()
        self.piece_style: PieceStyle = _piece_style(json.loads(self._tokenizer.to_str()))

    @property
    def end_ids(self) -> tuple[int, ...]:
        return _end_ids(self)

    @property
    def bos_ids(self) -> tuple[int, ...]:
        return _bos_ids(self)

    @property
    def pieces(self) -> list[str]:
        pieces = [""] * self._own_size
        for piece, token in self._tokenizer.get_vocab(with_added_tokens=True).items():
            pieces[token] = piece
        return _renamed(pieces, self.roles)

    @property
    def special(self) -> NDArray[np.bool_]:
        """Ids that the tokenizer leaves out among them."""
        special = np.array([piece == "" for piece in self.pieces], bool)
        special[self._own_size :] = True
        for token, added in self._tokenizer.get_added_tokens_decoder().items():
            special[token] |= added.special
        special[[self.eos_id, *self.bos_ids]] = True  # a file beside may name a piece that is not marked as special
        return special

    def special_id(self, name: str) -> int | None:
        if name in self.roles.names:
            return self.roles.names[name]
        token = self._tokenizer.token_to_id(name)
        if token in self.roles.names.values():
            return None  # it has another name now
        added = self._tokenizer.get_added_tokens_decoder().get(token) if token is not None else None
        return token if added is not None and added.special else None

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[NDArray[Any]]:
        texts = list(texts)
        try:
            if num_threads == 1:  # one at a time: an encoding is a hundred times as large as its ids
                found = (self._tokenizer.encode(text, add_special_tokens=False) for text in texts)
            else:  # the library shares a batch among all cores
                found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            return [np.array(encoding.ids, np.uint32) for encoding in found]
        except (TypeError, UnicodeEncodeError):
            raise _surrogate_error(texts) from None

    @property
    def reads_names(self) -> bool:
        return not self.roles.names

    def encode_with_offsets(self, text: str, spelled: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        try:
            found = (self._naming if spelled else self._tokenizer).encode(text, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            raise _surrogate_error([text]) from None
        return found.ids, found.offsets

    @cached_property
    def _naming(self) -> tokenizers.Tokenizer:
        """One that takes the name of a special token for it: another, since threads may be in the first, which must not
        change then."""
        naming = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        naming.encode_special_tokens = False
        return naming

    def decode(self, ids: Sequence[int]) -> str:
        own = [int(token) for token in ids if token < self._own_size]
        return self._tokenizer.decode(own, skip_special_tokens=True)

    def _special(self, role: str) -> int | None:
        """The token of a role: as the files beside say, else the first added token with one of the known names."""
        if role in self.roles.ids or role in self.roles.absent:
            return self.roles.ids.get(role)
        added = {token.content: number for number, token in self._tokenizer.get_added_tokens_decoder().items()}
        return next((added[name] for name in _HF_SPECIALS[role] if name in added), None)

    def _unsaid_end(self, behind: tuple[int, ...], ids: Mapping[str, int]) -> int:
        """The end of documents where no file beside names it: the id behind a text, or a token of a known name."""
        found = behind[0] if len(behind) == 1 else ids.get("eos", ids.get("sep"))
        if found is None:
            names = ", ".join(_HF_SPECIALS["eos"])
            raise UnknownEndError(
                f"{self.path}: has no end-of-sequence token, which documents need: none of its added tokens has "
                f"a known name ({names}), and no file beside it names one. Put the {TOKENIZER_CONFIG} of its folder "
                'beside it, with "eos_token".'
            )
        return found

    def _put_around(self) -> Around:
        """The ids that its post-processor puts before and behind a text."""
        plain, whole = self._tokenizer.encode("a", add_special_tokens=False).ids, self._tokenizer.encode("a").ids
        if not plain:
            return (), ()
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return tuple(whole[:start]), tuple(whole[start + len(plain) :])
        return (), ()


def _grown(size: int, roles: TokenRoles) -> int:
    """The size of a vocabulary with the new tokens that have ids above it."""
    return max([size, *(token + 1 for token in roles.names.values())])


def _renamed(pieces: list[str], roles: TokenRoles) -> list[str]:
    """Pieces with the names that some were given, and behind them the names of new tokens."""
    pieces += [""] * (_grown(len(pieces), roles) - len(pieces))
    for name, token in roles.names.items():
        pieces[token] = name
    return pieces


def _of_characters(text: str, pieces: Iterable[Any]) -> Iterator[tuple[int, int]]:
    """The characters of sentencepiece's pieces, which count bytes. Of pieces that are bytes of one character, all have
    that character: the library gives it to the last of them."""
    places = np.zeros(len(text.encode()) + 1, np.int64)
    sizes = [len(character.encode()) for character in text]
    places[np.cumsum(sizes)] = np.arange(1, len(text) + 1)
    found = [(int(places[piece.begin]), int(places[piece.end])) for piece in pieces]
    for number in reversed(range(len(found) - 1)):
        if found[number][0] == found[number][1]:
            found[number] = (found[number][0], found[number + 1][1])
    yield from found


def _roles(tokenizer: Tokenizer, said: Path | TokenRoles | None, lookup: Lookup) -> TokenRoles:
    if isinstance(said, TokenRoles):
        return said
    if said is not None:
        return read_settings(said, tokenizer.sha256, tokenizer.vocab_size)
    return roles_beside(tokenizer.path, tokenizer.sha256, lookup, tokenizer.vocab_size)


def _around_by_flags(roles: TokenRoles, bos_id: int | None, eos_id: int) -> Around | None:
    """The ids around a text by the flags of a tokenizer_config.json; None where it has none of them.

    As in transformers, the flags take the place of the post-processor in tokenizer.json.
    """
    flags = roles.files.get(TOKENIZER_CONFIG, {})
    if "add_bos_token" not in flags and "add_eos_token" not in flags:
        return None
    before = (bos_id,) if flags.get("add_bos_token") and bos_id is not None else ()
    return before, ((eos_id,) if flags.get("add_eos_token") else ())


def _end_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    return tuple(dict.fromkeys((tokenizer.eos_id, *tokenizer.roles.end_ids)))


def _bos_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """As it was recorded; of a folder in Hugging Face's format, what its tokenizer puts before a text."""
    if tokenizer.roles.bos_ids is not None:
        return tokenizer.roles.bos_ids
    return tokenizer.around[0] if MODEL_CONFIG in tokenizer.roles.files else ()


def _piece_style(tokenizer: Mapping[str, Any]) -> PieceStyle:
    """From the content of a tokenizer.json."""
    if tokenizer["model"].get("type") == "WordPiece":
        return "wordpiece"
    is_byte_level = "ByteLevel" in json.dumps([tokenizer.get("pre_tokenizer"), tokenizer.get("decoder")])
    return "byte_level" if is_byte_level else "sentencepiece"


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
