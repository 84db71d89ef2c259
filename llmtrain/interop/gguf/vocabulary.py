"""A tokenizer as keys of a GGUF file. llama.cpp has two kinds that a decoder of ours can have: `llama`, byte pairs as
sentencepiece has them, which joins by the score of the piece that comes of it; and `gpt2`, byte pairs over bytes.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unicodedata import is_normalized

from llmtrain.errors import ExportError
from llmtrain.interop.gguf.file_format import Value
from llmtrain.interop.gguf.pretokenizers import pretokenizer_name
from llmtrain.interop.text.special_tokens import NamedTokens
from llmtrain.interop.text.tokenizer_json import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE_MARK,
    UNKNOWN,
    read_model,
    text_frame,
)
from llmtrain.values.tokenizer import Tokenizer

USER_DEFINED, UNUSED = 4, 5
"""Kinds of tokens in a file; the others are as sentencepiece numbers them."""

_NEVER_JOINED = -1e6


@dataclass(frozen=True)
class FileVocabulary:
    """The keys of a tokenizer, and the texts for which its ids are the same in llama.cpp; `notes` tell of others."""

    keys: dict[str, Value]
    is_equal_for: Callable[[str], bool]
    notes: list[str]


@dataclass(frozen=True)
class Pieces:
    """The tokens of a file by their ids, each with its kind, and what they are joined by."""

    texts: list[str]
    kinds: list[int]
    keys: dict[str, Value]


def file_vocabulary(
    tokenizer: Tokenizer, named: NamedTokens, num_tokens: int, template: str | None, controls: frozenset[int]
) -> FileVocabulary:
    """The tokenizer of a model with `num_tokens` tokens; `controls` are those that its chat template writes.

    Raises ExportError for a tokenizer that llmtrain knows no form in llama.cpp for.
    """
    before, behind = text_frame(tokenizer, named, "decoder")
    if len(before) > 1 or behind not in ((), (named.eos_id,)):
        raise ExportError(
            f"{tokenizer.path}: puts the ids {list(before)} and {list(behind)} around a text; llama.cpp knows one "
            "token before it, and the end of text behind it."
        )
    notes, is_equal_for = list[str](), _always
    spelled = {named.eos_id, *named.ends, *named.all.values(), *before, *behind, *controls}
    spelled -= {named.mask[1]} if named.mask is not None else set()
    if tokenizer.path.suffix != ".json":
        pieces = _sentencepiece(tokenizer, spelled)
    else:
        content = json.loads(tokenizer.path.read_text("utf-8"))
        pieces = _byte_pairs(content, tokenizer) if content["model"].get("type") == "BPE" else None
    if pieces is None:
        raise ExportError(
            f"{tokenizer.path}: llama.cpp has no such tokenizer. Written are byte pairs: of sentencepiece with its 256 "
            "byte pieces and without normalization, as `llmtrain data tokenizer --kind bpe` trains them, and of a "
            "tokenizer.json over bytes."
        )
    if pieces.keys["tokenizer.ggml.model"] == "llama":
        notes.append("llama.cpp takes U+2581 in a text for a space; in training it was itself")
        is_equal_for = _has_no_mark
    elif json.loads(tokenizer.path.read_text("utf-8")).get("normalizer") is not None:
        notes.append("llama.cpp does not compose characters (NFC) as the tokenizer did in training")
        is_equal_for = _is_composed
    keys = {**_padded(pieces, num_tokens, tokenizer), **_special_ids(named, before, behind)}
    if len(named.ends) > 3:
        notes.append(f"llama.cpp stops at three tokens; generation stopped at {len(named.ends)}")
    if template is not None:
        keys["tokenizer.chat_template"] = template
    return FileVocabulary(keys, is_equal_for, notes)


def _always(text: str) -> bool:
    return True


def _has_no_mark(text: str) -> bool:
    return SPACE_MARK not in text


def _is_composed(text: str) -> bool:
    return is_normalized("NFC", text)


def _special_ids(named: NamedTokens, before: tuple[int, ...], behind: tuple[int, ...]) -> dict[str, Value]:
    begin = named.begin_id
    found: dict[str, Value] = {
        "tokenizer.ggml.bos_token_id": named.eos_id if begin is None else begin,
        "tokenizer.ggml.eos_token_id": named.eos_id,
        "tokenizer.ggml.add_bos_token": bool(before),
        "tokenizer.ggml.add_eos_token": bool(behind),
    }
    if named.pad is not None:
        found["tokenizer.ggml.padding_token_id"] = named.pad[1]
    # Of a chat model, the end of a turn and of a message: llama.cpp stops at each.
    others = [token for token in named.ends if token != named.eos_id]
    return found | {
        f"tokenizer.ggml.{name}_token_id": token for name, token in zip(("eot", "eom"), others, strict=False)
    }


def _padded(pieces: Pieces, num_tokens: int, tokenizer: Tokenizer) -> dict[str, Value]:
    """The keys, with a token for each row of the embedding. Raises ExportError for names that two tokens have."""
    texts, kinds, keys = [*pieces.texts], [*pieces.kinds], dict(pieces.keys)
    missing = num_tokens - len(texts)
    texts += [""] * missing
    kinds += [UNUSED] * missing
    texts = [text or f"[PAD{number}]" for number, text in enumerate(texts)]
    if len(set(texts)) < len(texts):
        twice = next(text for number, text in enumerate(texts) if text in texts[:number])
        raise ExportError(f"{tokenizer.path}: two tokens are called {twice!r}; llama.cpp ends at such a file.")
    if isinstance(scores := keys.get("tokenizer.ggml.scores"), list):
        keys["tokenizer.ggml.scores"] = [*map(float, scores), *[_NEVER_JOINED] * missing]
    return {**keys, "tokenizer.ggml.tokens": texts, "tokenizer.ggml.token_type": kinds}


def _sentencepiece(tokenizer: Tokenizer, spelled: set[int]) -> Pieces | None:
    proto = read_model(tokenizer.path)
    normalizer, kinds = proto.normalizer_spec, [piece.type for piece in proto.pieces]
    is_plain = not (normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces)
    fits = (proto.trainer_spec.model_type == proto.trainer_spec.BPE, is_plain, kinds.count(BYTE) == 256)
    if not all(fits) or set(kinds) - {NORMAL, UNKNOWN, CONTROL, BYTE}:
        return None
    # Text that spells what training never had stays text.
    kinds = [UNUSED if kind == CONTROL and token not in spelled else kind for token, kind in enumerate(kinds)]
    names = tokenizer.pieces
    added = len(names) - len(kinds)
    keys: dict[str, Value] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": bool(normalizer.add_dummy_prefix),
        "tokenizer.ggml.scores": [piece.score for piece in proto.pieces] + [_NEVER_JOINED] * added,
        "tokenizer.ggml.unknown_token_id": kinds.index(UNKNOWN),
    }
    return Pieces(names, [*kinds, *[CONTROL] * added], keys)


def _byte_pairs(content: dict[str, Any], tokenizer: Tokenizer) -> Pieces | None:
    """Of a tokenizer.json with byte pairs over bytes, or one that was made of a sentencepiece model."""
    model, names = content["model"], tokenizer.pieces
    merges = [tuple(merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in model["merges"]]
    added = {
        token["id"]: CONTROL if token.get("special") else USER_DEFINED for token in content.get("added_tokens", ())
    }
    added |= dict.fromkeys(tokenizer.roles.names.values(), CONTROL)
    kinds = [added.get(token, NORMAL if name else UNUSED) for token, name in enumerate(names)]
    pre = pretokenizer_name(content)
    if pre is not None:
        keys: dict[str, Value] = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre}
        return Pieces(names, kinds, keys | {"tokenizer.ggml.merges": [" ".join(merge) for merge in merges]})
    plain = (content.get("normalizer"), content.get("pre_tokenizer")) == (None, None)
    bytes_of = {f"<0x{byte:02X}>": byte for byte in range(256)}
    if not (plain and model.get("byte_fallback") and bytes_of.keys() <= model["vocab"].keys()):
        return None
    # The first merge that makes a piece decides, as its score would.
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge), rank)
    scores = [float(-1 - ranks[name]) if name in ranks else _NEVER_JOINED for name in names]
    unknown = model.get("unk_token")
    kinds = [
        BYTE if name in bytes_of else UNKNOWN if name == unknown else kind
        for name, kind in zip(names, kinds, strict=True)
    ]
    return Pieces(
        [name.replace(" ", SPACE_MARK) if kind == NORMAL else name for name, kind in zip(names, kinds, strict=True)],
        kinds,
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.add_space_prefix": False,
            "tokenizer.ggml.scores": scores,
        },
    )
