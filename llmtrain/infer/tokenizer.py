"""Which tokenizer belongs to a model: the one beside it, one that a user names, or that of an imported folder."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llmtrain.config.model import ModelConfig
from llmtrain.data.storage.manifest import TOKENIZER_NAMES, file_sha256
from llmtrain.data.token_roles import GENERATION, JSON_FILES, MODEL_CONFIG, SETTINGS_NAME, TrainedTokens, settings_text
from llmtrain.data.tokenizer import UnknownEndError, load_tokenizer, tokenizer_content
from llmtrain.errors import ConfigError, DataError
from llmtrain.values.tokenizer import Tokenizer, TokenRoles

_KNOWN_FILES = ("*.safetensors", "*.safetensors.index.json", "tokenizer.json", "chat_template.jinja", "llmtrain.json")
_SHOWN = 6

# Long enough for merges across words, and with what tokenizers treat in ways of their own.
_TEXTS = (
    "def export(self, name: str) -> None:\n\treturn [x ** 2 for x in range(10)]\n\n",
    "The quick brown fox jumps over the lazy dog, doesn't it?  Yes -- 3,141.59 times!\r\n",
    "  Ünïcödé 中文字 😀 \u2581 \ufb01 ½ <s></s><pad>[MASK]<|endoftext|> <0x41>",
    "aAbBcC0123456789 zZ\t\t~!@#$%^&*()_+{}|:\"<>?`-=[]\\;',./",
)


def model_tokenizer(
    given: Path | None, beside: Path | Tokenizer | None, model: ModelConfig, trained: TrainedTokens | None = None
) -> Tokenizer:
    """The tokenizer that `--tokenizer` names, or the one beside a model, which is a file, or was in the model's own;
    `trained` is what the checkpoint says of it.

    A named one must give the ids that the model was trained with: it has the hash that the checkpoint says, is the one
    beside the model, or encodes alike. Raises ConfigError where it is another one or there is none, DataError where
    the one beside the model is not the one that it was trained with.
    """
    trained = trained or TrainedTokens()
    if beside is None and given is None:
        known = f" It was trained with one of sha256 {trained.sha256}." if trained.sha256 else ""
        names = " or ".join(TOKENIZER_NAMES)
        raise ConfigError(f"No tokenizer lies beside the model: no {names}.{known} Name it with --tokenizer.")
    if given is not None and given.is_file() and file_sha256(given) == trained.sha256:
        assert beside is None or isinstance(beside, Path), "a checkpoint's tokenizer is a file"
        return _right_named(given, beside, trained)  # whatever has become of the one beside the model
    own = _own(beside, trained) if isinstance(beside, Path) else beside
    if given is None:
        assert own is not None
        if (fault := _too_large(own, model)) is not None:
            raise DataError(f"{own.path}: {fault} Copy the model's own tokenizer there.")
        return own
    # What is said of the model's own ids is said of the same ids in another file.
    named = load_tokenizer(given, own.roles.as_trained(own.eos_id, own.bos_ids) if own else None)
    if (fault := _too_large(named, model)) is not None:
        raise ConfigError(f"--tokenizer {given}: {fault} Give the tokenizer that the model was trained with.")
    if own is not None:
        fault = difference(named, own)
        known = f"the one beside the model ({own.path})"
    else:
        known = f"the one that the model was trained with (sha256 {str(trained.sha256)[:12]})"
        fault = f"its sha256 is {named.sha256[:12]}" if trained.sha256 is not None else None
    if fault is not None:
        raise ConfigError(f"--tokenizer {given}: is another tokenizer than {known}: {fault}. Give that one.")
    return named


def _own(path: Path, trained: TrainedTokens) -> Tokenizer:
    """The tokenizer beside a model, with its settings, as the checkpoint knows them. Raises DataError."""
    mend = "Copy the run's own file there, or the one of its data set, or name a good one with --tokenizer."
    if trained.sha256 is not None:
        try:
            actual = file_sha256(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}. {mend}") from None
        if actual != trained.sha256:
            raise DataError(
                f"{path}: is not the tokenizer that the model was trained with: expected sha256 {trained.sha256} as "
                f"its checkpoint says, actual {actual}. {mend}"
            )
    settings = path.parent / SETTINGS_NAME
    if trained.has_settings and not os.path.lexists(settings):
        raise DataError(f"{settings}: missing, and the run had one. Copy it there again, or that of its data set.")
    return _as_trained(load_tokenizer(path), settings, trained)


def _right_named(given: Path, beside: Path | None, trained: TrainedTokens) -> Tokenizer:
    """The tokenizer of the model in another place; what is said of it beside the model is said of it there."""
    settings = beside.parent / SETTINGS_NAME if beside else None
    if settings is None or not os.path.lexists(settings):
        return load_tokenizer(given)
    return _as_trained(load_tokenizer(given, settings), settings, trained)


def _as_trained(tokenizer: Tokenizer, settings: Path, trained: TrainedTokens) -> Tokenizer:
    """Raises DataError where texts would not begin and end as the documents did that the model has seen."""
    for name, expected in (("eos_id", trained.eos_id), ("bos_ids", trained.bos_ids)):
        if expected is not None and (actual := getattr(tokenizer, name)) != expected:
            raise DataError(
                f"{settings}: gives {name} = {actual} for {tokenizer.path}, and the documents that the model was "
                f"trained on had {expected}. Copy the file of the run, or of its data set, there again."
            )
    return tokenizer


def _too_large(tokenizer: Tokenizer, model: ModelConfig) -> str | None:
    if tokenizer.vocab_size <= model.vocabulary:
        return None
    return f"has {tokenizer.vocab_size} ids, and the model has {model.vocabulary} (model.vocab_size)."


def difference(one: Tokenizer, other: Tokenizer) -> str | None:
    """In words, the first thing in which two tokenizers do not give the same ids; None where nothing was found."""
    if one.sha256 == other.sha256:
        return None
    if one.vocab_size != other.vocab_size:
        return f"it has {one.vocab_size} ids, not {other.vocab_size}"
    for text, ids, others in zip(_TEXTS, one.encode_batch(_TEXTS), other.encode_batch(_TEXTS), strict=True):
        if ids.tolist() != others.tolist():
            return f"{text[:20]!r}... begins with the ids {ids[:_SHOWN].tolist()}, not {others[:_SHOWN].tolist()}"
    return None


@dataclass(frozen=True)
class FolderTokenizer:
    """The tokenizer of an imported folder as it is kept: a file, its name, and what its settings file says.

    `tokenizer` is None where it cannot be used; `notes` say why, and what of the folder is not kept.
    """

    name: str | None
    content: bytes
    roles: TokenRoles | None
    tokenizer: Tokenizer | None
    notes: tuple[str, ...]

    def about(self) -> dict[str, Any]:
        """The imported checkpoint's record of it."""
        if self.tokenizer is None:
            return {}
        return {"data": TrainedTokens(self.tokenizer.sha256, has_settings=True).to_json()}

    def write(self, folder: Path) -> None:
        """Put it into a run folder."""
        if self.name is not None:
            (folder / self.name).write_bytes(self.content)
        if self.roles is not None and self.tokenizer is not None:
            (folder / SETTINGS_NAME).write_text(settings_text(self.roles, self.tokenizer.sha256), "utf-8")


def folder_tokenizer(folder: Path, model: ModelConfig) -> FolderTokenizer:
    """The tokenizer of a folder in Hugging Face's format. Raises DataError where a file is damaged.

    Where it has no tokenizer.json, transformers makes one of the files that it has.
    """
    from llmtrain.interop.text.carried import reader_tokenizer

    notes: list[str] = []
    reader = reader_tokenizer(folder, notes)
    with _as_json(folder, reader.json if reader else None) as path:
        if path is None:
            return FolderTokenizer(None, b"", None, None, (*notes, "the folder holds no tokenizer that llmtrain reads"))
        if path.parent != folder:
            notes.append("tokenizer.json: made by transformers of the tokenizer files in the folder")
        name, content = f"tokenizer{path.suffix}", tokenizer_content(path)
        try:
            tokenizer = load_tokenizer(path)
        except UnknownEndError as error:
            return FolderTokenizer(name, content, None, None, (*notes, f"no text can be made or read: {error}"))
    if tokenizer.roles.eos_id is None and tokenizer.eos_id not in tokenizer.around[1]:
        name_of_end = tokenizer.pieces[tokenizer.eos_id]
        notes.append(f"no file says which token ends a text: {name_of_end} (id {tokenizer.eos_id}) is taken")
    notes += [*tokenizer.roles.notes, *_not_kept(folder, name)]
    if (fault := _too_large(tokenizer, model)) is not None:
        notes.append(f"the tokenizer {fault} The ids above it cannot be used")
    bos_ids = tokenizer.around[0]
    if reader is not None and reader.before != bos_ids:
        notes.append(
            f"transformers puts the ids {list(reader.before)} before a text, not {list(bos_ids)}: so it is done"
        )
        bos_ids = reader.before
    roles: TokenRoles = replace(tokenizer.roles, ids=tokenizer.roles.ids).as_trained(tokenizer.eos_id, bos_ids)
    return FolderTokenizer(name, content, roles, tokenizer, tuple(notes))


@contextmanager
def _as_json(folder: Path, made: str | None) -> Iterator[Path | None]:
    """A tokenizer's file with the folder's other files beside it; one that was made lies in a folder of its own."""
    found = folder / "tokenizer.json"
    if found.is_file() or made is None:
        model = folder / "tokenizer.model"
        yield found if found.is_file() else model if model.is_file() else None
        return
    with TemporaryDirectory(prefix="llmtrain-") as place:
        for path in (folder / name for name in JSON_FILES):
            if path.is_file():
                shutil.copyfile(path, Path(place, path.name))
        for path in (folder / "chat_template.jinja", folder / "additional_chat_templates"):
            if path.exists():
                (shutil.copytree if path.is_dir() else shutil.copyfile)(path, Path(place, path.name))
        Path(place, "tokenizer.json").write_text(made, "utf-8")
        yield Path(place, "tokenizer.json")


def _not_kept(folder: Path, tokenizer: str) -> Iterator[str]:
    """Files of the folder that an export will not have; files that do not belong to a model are passed over."""
    known = {path for pattern in _KNOWN_FILES for path in folder.glob(pattern)}
    files = {path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")} - known
    names = sorted(path.name for path in files if path.name not in (*JSON_FILES, tokenizer, "README.md"))
    if names:
        yield f"not kept: {', '.join(names)}"


def decoder_start(tokenizer: Tokenizer) -> int | None:
    """The id that the folder's decoder begins with, where a file names it."""
    for name in (MODEL_CONFIG, GENERATION):
        files: Mapping[str, Any] = tokenizer.roles.files.get(name, {})
        token = files.get("decoder_start_token_id")
        if type(token) is int and token >= 0:
            return token
    return None
