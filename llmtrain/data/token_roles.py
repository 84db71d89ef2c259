"""Facts about a tokenizer beside its own file: the tokens that end, begin and fill texts, and its folder's settings.

A tokenizer.json does not say which token ends a text. A folder in Hugging Face's format says so in the files beside
it; what they say is kept in one file, `tokenizer_settings.json`, that travels with the tokenizer into data sets, run
folders and exports. Imports no torch and no tokenizer's library.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmtrain.errors import DataError
from llmtrain.files import SEAL, parse_json, read_text, sealed, unsealed
from llmtrain.values.tokenizer import GENERATION, MODEL_CONFIG, MODEL_FILES, TokenRoles

SETTINGS_NAME = "tokenizer_settings.json"
SETTINGS_VERSION = 1
EQUAL_NAME = "llmtrain.json"
"""In an own export: which tokenizers give the same ids as the exported one, as was proved."""
TOKENIZER_CONFIG, TOKENS_MAP = "tokenizer_config.json", "special_tokens_map.json"
JSON_FILES = (TOKENIZER_CONFIG, TOKENS_MAP, *MODEL_FILES)
CHAT_TEMPLATE, CHAT_TEMPLATES = "chat_template.jinja", "additional_chat_templates"

ROLES = ("eos", "bos", "pad", "unk", "mask", "cls", "sep")

Lookup = Callable[[str], int | None]
"""The id of a token by its text."""


@dataclass(frozen=True)
class TrainedTokens:
    """A checkpoint's record of the tokenizer that its model was trained with; None where it has none.

    `has_settings`: a settings file lay beside it.
    """

    sha256: str | None = None
    eos_id: int | None = None
    bos_ids: tuple[int, ...] | None = None
    has_settings: bool = False

    def to_json(self) -> dict[str, Any]:
        """Keys of what a checkpoint says about its data."""
        bos_ids = None if self.bos_ids is None else list(self.bos_ids)
        known = {"tokenizer_sha256": self.sha256, "eos_id": self.eos_id, "bos_ids": bos_ids}
        return {**known, "tokenizer_settings": self.has_settings}

    @classmethod
    def of(cls, about: Mapping[str, Any]) -> "TrainedTokens":
        """From what a checkpoint says about where it comes from; older ones say less."""
        data = about.get("data")
        said = data if isinstance(data, dict) else {}
        sha256, eos_id, bos_ids = (said.get(name) for name in ("tokenizer_sha256", "eos_id", "bos_ids"))
        return cls(
            sha256 if isinstance(sha256, str) else None,
            eos_id if isinstance(eos_id, int) else None,
            tuple(bos_ids) if isinstance(bos_ids, list) else None,
            said.get("tokenizer_settings") is True,
        )


def roles_beside(tokenizer: Path, sha256: str, lookup: Lookup, vocab_size: int) -> TokenRoles:
    """Roles from the files beside a tokenizer: its settings file, else those of a folder in Hugging Face's format.

    Raises DataError where one of them is damaged, or is another tokenizer's.
    """
    kept = tokenizer.parent / SETTINGS_NAME
    if os.path.lexists(kept):
        return read_settings(kept, sha256, vocab_size)
    roles = _declared(read_folder(tokenizer.parent), lookup, vocab_size)
    return replace(roles, equal_sha256=_proved_equal(tokenizer.parent / EQUAL_NAME, sha256))


def _proved_equal(path: Path, sha256: str) -> tuple[str, ...]:
    """Tokenizers that an own export was proved equal to. Raises DataError where its tokenizer is another one now."""
    said = read_json_object(path) if os.path.lexists(path) else {}
    if said.get("tokenizer_sha256", sha256) != sha256:
        raise DataError(
            f"{path}: tells of the tokenizer with sha256 {str(said['tokenizer_sha256'])[:12]}, the one beside it has "
            f"{sha256[:12]}. Export again; after a change on purpose, remove this file."
        )
    equal = said.get("equal_sha256")
    return tuple(text for text in equal if isinstance(text, str)) if isinstance(equal, list) else ()


def read_folder(folder: Path) -> dict[str, Any]:
    """The files of a folder that say how its tokenizer and its generation are used, by their names."""
    found: dict[str, Any] = {}
    for name in JSON_FILES:
        if os.path.lexists(folder / name):
            found[name] = read_json_object(folder / name)
    templates = [folder / CHAT_TEMPLATE, *sorted((folder / CHAT_TEMPLATES).glob("*.jinja"))]
    for path in templates:
        if os.path.lexists(path):
            found[path.relative_to(folder).as_posix()] = _read_text(path)
    return found


def _declared(files: dict[str, Any], lookup: Lookup, vocab_size: int) -> TokenRoles:
    """Roles that files give. Where they contradict each other, the tokenizer's own files win over those of the model,
    for they name the token, and config.json wins over generation_config.json, which may name several ends."""
    notes: list[str] = []
    ids: dict[str, int] = {}
    absent: list[str] = []
    for role in ROLES:
        said = list(_said(files, role, lookup))
        usable = [token for _, _, token in said if token is not None and _is_id(token, vocab_size)]
        notes += [
            f"{where}: {role}_token = {value!r} is not a token of the tokenizer: not used"
            for where, value, token in said
            if token is not None and not _is_id(token, vocab_size)
        ]
        if usable:
            ids[role] = usable[0]
        elif said and said[0][1] is None:
            absent.append(role)
    ends = [ids["eos"]] if "eos" in ids else []
    for name in (GENERATION, MODEL_CONFIG):
        named = _listed(files.get(name, {}).get("eos_token_id"))
        ends += [token for token in named if _is_id(token, vocab_size)]
        if len(named) > 1 and (beyond := [token for token in named if not _is_id(token, vocab_size)]):
            notes.append(f"{name}: eos_token_id {beyond} are not tokens of the tokenizer: nothing ends there")
    generation_ends = _listed(files.get(GENERATION, {}).get("eos_token_id"))
    if ends and generation_ends and ends[0] not in generation_ends:
        notes.append(
            f"documents end with token {ends[0]}, at which {GENERATION} does not stop (eos_token_id = "
            f"{files[GENERATION]['eos_token_id']}); `llmtrain generate` stops at all of them"
        )
    return TokenRoles(ids.get("eos"), tuple(dict.fromkeys(ends)), None, ids, tuple(absent), (), files, tuple(notes))


def _said(files: Mapping[str, Any], role: str, lookup: Lookup) -> Iterator[tuple[str, Any, int | None]]:
    """Each file's word on a role: (file, value, id); the id is -1 for what the tokenizer does not have."""
    for name in (TOKENIZER_CONFIG, TOKENS_MAP):
        if f"{role}_token" in files.get(name, {}):
            value = files[name][f"{role}_token"]
            text = value.get("content") if isinstance(value, dict) else value
            token = lookup(text) if isinstance(text, str) else None
            yield name, text, -1 if token is None and text is not None else token
    for name in (MODEL_CONFIG, GENERATION):
        if f"{role}_token_id" in files.get(name, {}):
            value = files[name][f"{role}_token_id"]
            listed = _listed(value)
            yield name, value, listed[0] if listed else None if value is None else -1


def _listed(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [token for token in values if type(token) is int]


def _is_id(token: int | None, vocab_size: int) -> bool:
    return token is not None and 0 <= token < vocab_size


def settings_text(roles: TokenRoles, sha256: str) -> str:
    """The content of a settings file; the same roles give the same text."""
    content = {
        "schema_version": SETTINGS_VERSION,
        "tokenizer_sha256": sha256,
        "eos_id": roles.eos_id,
        "end_ids": list(roles.end_ids),
        "bos_ids": None if roles.bos_ids is None else list(roles.bos_ids),
        "ids": dict(roles.ids),
        "absent": list(roles.absent),
        "equal_sha256": list(roles.equal_sha256),
        "files": dict(roles.files),
        **({"names": dict(roles.names)} if roles.names else {}),
    }
    return json.dumps(sealed(content), indent=1, ensure_ascii=False) + "\n"


def read_settings(path: Path, sha256: str | None = None, vocab_size: int | None = None) -> TokenRoles:
    """A settings file, of the tokenizer with this hash. Raises DataError where it is not what it should be."""
    raw = read_json_object(path)
    try:
        unsealed(raw)
    except ValueError as error:
        raise _damaged(path, str(error)) from None
    if SEAL not in raw:
        raise _damaged(path, f"it has no {SEAL}")
    if raw.get("schema_version") != SETTINGS_VERSION:
        raise _damaged(path, f"schema_version = {raw.get('schema_version')!r}: this llmtrain reads {SETTINGS_VERSION}")
    if sha256 is not None and raw.get("tokenizer_sha256") != sha256:
        raise DataError(
            f"{path}: belongs to the tokenizer with sha256 {str(raw.get('tokenizer_sha256'))[:12]}, the one beside it "
            f"has {sha256[:12]}. Copy the two from one place, or remove this file for a tokenizer of another origin."
        )
    ids, files, names = raw.get("ids"), raw.get("files"), raw.get("names", {})
    if not isinstance(ids, dict) or not isinstance(files, dict) or not isinstance(names, dict):
        raise _damaged(path, "ids, files and names must be objects")
    lists: dict[str, Any] = {name: raw.get(name) for name in ("end_ids", "bos_ids")}
    numbers = [
        raw.get("eos_id"),
        *ids.values(),
        *names.values(),
        *(token for value in lists.values() for token in value or ()),
    ]
    # Names may be those of new tokens, above the tokenizer's own.
    limit = 1 << 32 if vocab_size is None else vocab_size + len(names)
    if any(token is not None and (type(token) is not int or not 0 <= token < limit) for token in numbers):
        raise _damaged(path, f"ids must be whole numbers below {limit}")
    texts = {name: raw.get(name) for name in ("absent", "equal_sha256")}
    if any(not isinstance(value, list) or any(type(text) is not str for text in value) for value in texts.values()):
        raise _damaged(path, "absent and equal_sha256 must be lists of texts")
    bos_ids = None if lists["bos_ids"] is None else tuple(lists["bos_ids"])
    return TokenRoles(
        raw.get("eos_id"),
        tuple(lists["end_ids"] or ()),
        bos_ids,
        ids,
        tuple(texts["absent"] or ()),
        tuple(texts["equal_sha256"] or ()),
        files,
        names=names,
    )


def settings_tokenizer(path: Path) -> str:
    """The hash of the tokenizer that a settings file belongs to."""
    return str(read_json_object(path).get("tokenizer_sha256"))


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of reasonable size. Raises DataError for anything else."""
    try:
        content = parse_json(_read_text(path))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}). Copy the file again.") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: must hold a JSON object, not {type(content).__name__}. Copy the file again.")
    return content


def _read_text(path: Path) -> str:
    try:
        return read_text(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise DataError(f"{path}: not UTF-8 ({error}). Copy the file again.") from None


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(f"{path}: {reason}. Copy the file again, or write the shards or the import again.")
