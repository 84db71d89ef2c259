"""The tokenizer in a GGUF file as the files of a Hugging Face folder, which llmtrain reads anywhere."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as sentencepiece_model

from llmtrain.errors import DataError, ExportError
from llmtrain.interop.gguf.pretokenizers import CUTTINGS, OTHER_NAMES, pretokenizer_steps
from llmtrain.interop.gguf.vocabulary import UNUSED, USER_DEFINED
from llmtrain.interop.text.tokenizer_json import BYTE, CONTROL, NORMAL, UNKNOWN, convert

_KEY = "tokenizer.ggml."
_KINDS = (NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE)


def write_tokenizer_files(folder: Path, metadata: Mapping[str, Any], path: Path) -> list[str]:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json; returns notes, and writes nothing where
    llmtrain has no such tokenizer.

    Raises DataError where the keys do not fit each other; `path` is the file that they are of.
    """
    said = {key.removeprefix(_KEY): value for key, value in metadata.items() if key.startswith(_KEY)}
    kind = said.get("model")
    if kind not in ("llama", "gpt2"):
        return [f"{_KEY}model = {str(kind)[:60]}: llmtrain reads llama and gpt2, so the tokenizer is not kept"]
    tokens = _list(said, "tokens", str, path)
    kinds = _list(said, "token_type", int, path) if "token_type" in said else [NORMAL] * len(tokens)
    if len(kinds) != len(tokens) or set(kinds) - {*_KINDS}:
        raise DataError(f"{path}: {_KEY}token_type does not give each of {len(tokens):,} tokens a kind that there is.")
    if len(set(tokens)) < len(tokens):
        raise DataError(f"{path}: {_KEY}tokens has one token twice.")
    names = {role: _id(said, f"{role}_token_id", len(tokens), path) for role in ("bos", "eos", "eot", "eom", "padding")}
    if kind == "llama":
        notes = _write_sentencepiece(folder, said, (tokens, kinds), path)
    else:
        notes = _write_byte_pairs(folder, said, (tokens, kinds), path)
    if not (folder / "tokenizer.json").exists():
        return notes
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    roles = {"bos_token": names["bos"], "eos_token": names["eos"], "pad_token": names["padding"]}
    config |= {role: tokens[token] for role, token in roles.items() if token is not None}
    # What llama.cpp does where a file does not say so.
    config["add_bos_token"] = bool(said.get("add_bos_token", kind == "llama" or said.get("pre") == "llama-bpe"))
    config["add_eos_token"] = bool(said.get("add_eos_token", False))
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    ends = [names[role] for role in ("eos", "eot", "eom") if names[role] is not None]
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "generation_config.json", {"eos_token_id": list(dict.fromkeys(ends))})
    return notes


def _list(said: Mapping[str, Any], key: str, kind: type, path: Path) -> list[Any]:
    found = said.get(key)
    if not isinstance(found, list) or not found or type(found[0]) is not kind:
        raise DataError(f"{path}: {_KEY}{key} is no list of values of the kind that it must have.")
    return found


def _id(said: Mapping[str, Any], key: str, count: int, path: Path) -> int | None:
    token = said.get(key)
    if token is None or token == 0xFFFFFFFF:  # what some converters write where there is none
        return None
    if type(token) is not int or not 0 <= token < count:
        raise DataError(f"{path}: {_KEY}{key} = {str(token)[:40]}, and the file has {count:,} tokens.")
    return token


def _write_sentencepiece(
    folder: Path, said: Mapping[str, Any], pieces: tuple[list[str], list[int]], path: Path
) -> list[str]:
    tokens, kinds = pieces
    scores = _list(said, "scores", float, path)
    if len(scores) != len(tokens):
        raise DataError(f"{path}: {_KEY}scores has {len(scores):,} numbers for {len(tokens):,} tokens.")
    if kinds.count(BYTE) not in (0, 256) or kinds.count(UNKNOWN) != 1 or USER_DEFINED in kinds:
        return [f"the tokenizer has {kinds.count(BYTE)} byte pieces, or pieces that llmtrain has no form for: not kept"]
    proto = sentencepiece_model.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        proto.pieces.add(piece=token, score=score, type=CONTROL if kind == UNUSED else kind)
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.unk_piece = tokens[kinds.index(UNKNOWN)]
    proto.trainer_spec.byte_fallback = BYTE in kinds
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = bool(said.get("add_space_prefix", True))
    proto.normalizer_spec.remove_extra_whitespaces = False
    model = folder / "pieces"
    model.write_bytes(proto.SerializeToString())
    spelled = {number for number, kind in enumerate(kinds) if kind == CONTROL}
    try:
        convert(model, spelled).save(str(folder / "tokenizer.json"))
    except ExportError as error:
        return [f"the tokenizer is not kept: {str(error).splitlines()[1].strip()}"]
    finally:
        model.unlink()
    return []


def _write_byte_pairs(
    folder: Path, said: Mapping[str, Any], pieces: tuple[list[str], list[int]], path: Path
) -> list[str]:
    tokens, kinds = pieces
    pre = str(said.get("pre", "default"))[:60]
    name = OTHER_NAMES.get(pre, pre)
    if name not in CUTTINGS:
        return [f"{_KEY}pre = {pre}: llmtrain reads {', '.join(CUTTINGS)}, so the tokenizer is not kept"]
    known, cutting = {*tokens}, CUTTINGS[name]
    merges = [merge.split(" ") for merge in _list(said, "merges", str, path)]
    if not all(len(merge) == 2 and {*merge, "".join(merge)} <= known for merge in merges):
        raise DataError(f"{path}: {_KEY}merges joins what are no tokens, or makes none.")
    added = [
        {"id": token, "content": tokens[token], "special": kind != USER_DEFINED, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False}
        for token, kind in enumerate(kinds) if kind != NORMAL
    ]  # fmt: skip
    content = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": pretokenizer_steps(cutting),
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": merges,
            "ignore_merges": cutting.ignore_merges,
        },
    }
    _write_json(folder / "tokenizer.json", content)
    return []


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), "utf-8")
