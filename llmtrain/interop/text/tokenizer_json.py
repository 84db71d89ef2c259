"""A sentencepiece model as a Hugging Face tokenizer.json that gives the same ids.

Three things differ between the two libraries and are dealt with here:
- A space is a space here, not U+2581: so a U+2581 in a text stays what it is and is spelled in bytes.
- The merges of a byte-pair model are not in sentencepiece's file. A piece may be reached from each of its splits
  into two pieces, so each is a merge, and the merges stand in the order of the pieces' scores.
- The unigram model here would match control and byte pieces in a text. They get a score that no path takes.
"""

import json
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as sentencepiece_model
from tokenizers import AddedToken, Regex, models, pre_tokenizers
from tokenizers import Tokenizer as HfTokenizer

from llmtrain.errors import ExportError
from llmtrain.interop.text.carried import TOKENIZER_CONFIG, carry_tokenizer, follow_training, write_template
from llmtrain.interop.text.sentencepiece_model import decoder_of, is_plain, normalizer_of, trial_texts
from llmtrain.interop.text.special_tokens import NamedTokens, around_of
from llmtrain.values.tokenizer import Around, Tokenizer

SPACE_MARK = "\u2581"
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
"""Kinds of pieces in sentencepiece's file."""

_UNKNOWN = ("<unk>", "[UNK]")

_UNK_PENALTY = 10.0
"""Both libraries rate a character without a piece this much below the worst piece."""


@dataclass(frozen=True)
class TokenizerSettings:
    """The settings of a model that its tokenizer's files follow. `kind` is transformers' model_type."""

    max_seq_len: int
    family: str = "decoder"
    token_types: int = 0
    kind: str = "llama"
    template: str | None = None
    """The chat template that the model was trained with."""
    controls: frozenset[int] = frozenset()
    """The control tokens that it writes."""


def text_frame(tokenizer: Tokenizer, named: NamedTokens, family: str) -> Around:
    """The tokens that an exported tokenizer puts before and behind a text: those of training.

    What an imported decoder's tokenizer puts behind one stays, as its folder had it.
    """
    before, behind = named.frame(family)
    return (before, tokenizer.around[1]) if family == "decoder" and _is_carried(tokenizer) else (before, behind)


def _is_carried(tokenizer: Tokenizer) -> bool:
    return TOKENIZER_CONFIG in tokenizer.roles.files


def write_tokenizer(folder: Path, tokenizer: Tokenizer, named: NamedTokens, settings: TokenizerSettings) -> list[str]:
    """Write tokenizer.json, tokenizer_config.json, an imported folder's as it was, and, for readers that take it
    rightly, tokenizer.model; returns notes.

    Raises ExportError for a model that cannot be converted, and special tokens whose ids cannot be had.
    """
    target = folder / "tokenizer.json"
    frame = text_frame(tokenizer, named, settings.family)
    if tokenizer.path.suffix == ".json":
        shutil.copyfile(tokenizer.path, target)
        if tokenizer.roles.names:
            _rename(target, tokenizer.roles.names)
        converted = HfTokenizer.from_file(str(target))
    else:
        # The control pieces that a text can spell: those of training, of a mask only an encoder's.
        before, behind = named.frame(settings.family)
        known = {tokenizer.eos_id, *named.all.values(), *before, *behind, *settings.controls}
        masks = {named.mask[1]} if named.mask is not None and settings.family != "encoder" else set()
        converted = convert(tokenizer.path, known - masks, tokenizer.roles.names)
        converted.save(str(target))
        # llama.cpp's converter takes such a file rightly for these kinds alone, and as byte pairs, whatever it is. For
        # Qwen3 it puts a space before every text, for T5 it has no bytes for what has no piece: without the file it
        # refuses, which is better.
        proto = read_model(tokenizer.path, tokenizer.roles.names)
        is_bpe = proto.trainer_spec.model_type == proto.trainer_spec.BPE
        grown = tokenizer.vocab_size > len(proto.pieces)  # which that file could not say
        if settings.kind in ("llama", "mistral", "mixtral") and is_bpe and is_plain(proto) and not grown:
            renamed = proto.SerializeToString() if tokenizer.roles.names else tokenizer.path.read_bytes()
            (folder / "tokenizer.model").write_bytes(renamed)
    added = _add_names(converted, {**named.all, **tokenizer.roles.names})
    if added:
        converted.save(str(target))
    joined = settings.family == "encoder"
    if not _is_carried(tokenizer):
        content = _tokenizer_config(converted, tokenizer, named, settings)
        (folder / TOKENIZER_CONFIG).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
        own = around_of(HfTokenizer.from_file(str(target)))
        return [*write_template(folder, settings.template), *follow_training(folder, converted, own, frame, joined)]
    used = {"mask_token": named.mask, "pad_token": named.pad}
    roles = {role: found[0] for role, found in used.items() if found is not None and found[0] in added}
    notes = carry_tokenizer(folder, tokenizer.roles.files, roles)
    notes += write_template(folder, settings.template)
    return notes + follow_training(folder, converted, tokenizer.around, frame, joined)


def _tokenizer_config(
    converted: HfTokenizer, tokenizer: Tokenizer, named: NamedTokens, settings: TokenizerSettings
) -> dict[str, Any]:
    """Roles are named only where training had them: readers put a beginning of text or a class token where it has a
    name, and take text that spells it for the token."""
    before, behind = named.frame(settings.family)
    special = {"eos_token": tokenizer.eos_id, "mask_token": named.mask and named.mask[1]}
    special |= {"pad_token": named.pad and named.pad[1]}
    if settings.family == "decoder":
        special["bos_token"] = named.begin_id
    around = {"bos_token": tokenizer.bos_id, "cls_token": tokenizer.cls_id, "sep_token": tokenizer.sep_id}
    special |= {role: token for role, token in around.items() if token in (*before, *behind)}
    if settings.family == "encoder" and tokenizer.path.suffix == ".json":  # its own, whether it puts them there or not
        special |= {"cls_token": tokenizer.cls_id, "sep_token": tokenizer.sep_id}
    if settings.family != "encoder":
        del special["mask_token"]
    names = {role: converted.id_to_token(token) for role, token in special.items() if token is not None}
    unknown = [name for name in _UNKNOWN if converted.token_to_id(name) in converted.get_added_tokens_decoder()]
    if unknown:
        names["unk_token"] = unknown[0]
    # transformers 5 writes both sides anew from these two keys, so others than these are left to tokenizer.json.
    ends = {"add_bos_token": False, "add_eos_token": behind == (tokenizer.eos_id,)}
    simple = before == () and behind in ((), (tokenizer.eos_id,))
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": settings.max_seq_len,
        "model_input_names": ["input_ids", *["token_type_ids"] * (settings.token_types > 1), "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        **(ends if simple else {}),
        **names,
    }


def _add_names(converted: HfTokenizer, names: Mapping[str, int]) -> set[str]:
    """Give ids above the tokenizer's their names; returns those. Raises ExportError where that cannot be."""
    nameless = sorted((token, name) for name, token in names.items() if converted.token_to_id(name) != token)
    for token, name in nameless:
        # The library numbers what is added from the end on.
        size = converted.get_vocab_size(with_added_tokens=True)
        if token != size:
            raise ExportError(
                f"The special token {name} has the id {token}, but the next that a tokenizer.json can name is {size}. "
                "Special tokens that follow the tokenizer's ids without a gap can be exported."
            )
        converted.add_special_tokens([AddedToken(name, special=True, normalized=False)])
    return {name for _, name in nameless}


def _rename(path: Path, names: Mapping[str, int]) -> None:
    """Give tokens of a tokenizer.json other names."""
    content = json.loads(path.read_text("utf-8"))
    texts = {token: name for name, token in names.items()}
    for added in content["added_tokens"]:
        added["content"] = texts.get(added["id"], added["content"])
    vocab = content["model"]["vocab"]
    if isinstance(vocab, dict):
        content["model"]["vocab"] = {texts.get(token, text): token for text, token in vocab.items()}
    else:
        content["model"]["vocab"] = [[texts.get(token, text), score] for token, (text, score) in enumerate(vocab)]
    path.write_text(json.dumps(content, ensure_ascii=False), "utf-8")


def convert(path: Path, spelled: Collection[int] | None = None, names: Mapping[str, int] | None = None) -> HfTokenizer:
    """The tokenizer of a sentencepiece file. Raises ExportError with all settings that have no equivalent.

    `spelled` are the control pieces that a text can spell there, None: all. What training never had is better no token
    at all: text that spells it stays text. `names` are those of reserved pieces.
    """
    proto = read_model(path, names or {})
    if problems := _obstacles(proto):
        listed = "\n  ".join(problems)
        raise ExportError(
            f"{path}: this sentencepiece model has no equal tokenizer.json:\n  {listed}\n"
            "Tokenizers that `llmtrain data tokenizer` trains have one."
        )
    unigram = proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM
    tokenizer = HfTokenizer(_unigram_model(proto) if unigram else _bpe_model(proto))
    # Separators: characters without a piece that occur in control and byte pieces. Where `<` has no piece, spelling
    # `<s>` costs more than any score that the library lets `<s>` have. Such a character is never part of a longer
    # piece, so cutting a text at it changes nothing else.
    normal = {_text(piece) for piece in proto.pieces if piece.type == NORMAL}
    reserved = {character for piece in proto.pieces if piece.type != NORMAL for character in piece.piece}
    if unigram and (separators := sorted(reserved - normal)):
        pattern = Regex("|".join(re.escape(character) for character in separators))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="isolated")
    num_bytes = sum(piece.type == BYTE for piece in proto.pieces)
    tokenizer.normalizer = normalizer_of(proto, num_bytes)
    tokenizer.decoder = decoder_of(proto)
    special = [
        piece.piece
        for number, piece in enumerate(proto.pieces)
        if piece.type == UNKNOWN or (piece.type == CONTROL and (spelled is None or number in spelled))
    ]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    tokenizer.encode_special_tokens = True
    return tokenizer


def export_obstacles(tokenizer: Tokenizer) -> list[str]:
    """The reasons why a tokenizer has no equal tokenizer.json, so that no model of it can be exported.

    Those that change a text are tried on some texts: the two libraries do not treat every character alike.
    """
    if tokenizer.path.suffix == ".json":
        return []
    proto = read_model(tokenizer.path)
    if (problems := _obstacles(proto)) or is_plain(proto):
        return problems
    converted = convert(tokenizer.path)
    for text in trial_texts():
        expected, actual = tokenizer.encode(text), converted.encode(text, add_special_tokens=False).ids
        if expected != actual:
            at = next((at for at, (one, other) in enumerate(zip(expected, actual, strict=False)) if one != other), 0)
            near = tokenizer.decode(expected[max(0, at - 4) : at + 4])
            return [f"a tokenizer.json made of it gives other ids, as near {near!r}"]
    return []


def read_model(path: Path, names: Mapping[str, int] = MappingProxyType({})) -> Any:
    """The content of a sentencepiece file, with other names for some pieces."""
    # The module makes its classes when it is imported, where a type checker does not see them.
    proto = sentencepiece_model.ModelProto.FromString(path.read_bytes())  # pyright: ignore[reportAttributeAccessIssue]
    for name, token in names.items():
        if token < len(proto.pieces):
            proto.pieces[token].piece = name
    return proto


def _obstacles(proto: Any) -> list[str]:
    normalizer, trainer = proto.normalizer_spec, proto.trainer_spec
    normal = {piece.piece for piece in proto.pieces if piece.type == NORMAL}
    merged = [piece.score for piece in proto.pieces if piece.type == NORMAL and len(piece.piece) > 1]
    other = sorted({piece.type for piece in proto.pieces} - {NORMAL, UNKNOWN, CONTROL, BYTE})
    num_bytes = sum(piece.type == BYTE for piece in proto.pieces)
    lone = sorted({character for piece in normal for character in piece} - normal)
    is_bpe = trainer.model_type == trainer.BPE
    checks = (
        (is_bpe or trainer.model_type == trainer.UNIGRAM, "model_type must be bpe or unigram"),
        (not trainer.treat_whitespace_as_suffix, "treat_whitespace_as_suffix must be false"),
        (normalizer.escape_whitespaces, "escape_whitespaces must be true"),
        (not other, "user-defined or unused pieces are not supported"),
        (num_bytes in (0, 256), f"it has {num_bytes} of 256 byte pieces"),
        (not lone, f"characters occur in pieces and are none themselves: {lone[:10]}"),
        (not is_bpe or len(set(merged)) == len(merged), "two pieces have the same score"),
    )
    return [reason for holds, reason in checks if not holds]


def _text(piece: Any) -> str:
    """A piece as it stands in tokenizer.json."""
    return piece.piece.replace(SPACE_MARK, " ") if piece.type == NORMAL else piece.piece


def _bpe_model(proto: Any) -> models.BPE:
    normal = {_text(piece): piece.score for piece in proto.pieces if piece.type == NORMAL}
    best_first = sorted(normal, key=lambda text: -normal[text])
    merges = [
        (text[:cut], text[cut:])
        for text in best_first
        for cut in range(len(text) - 1, 0, -1)
        if text[:cut] in normal and text[cut:] in normal
    ]
    vocab = {_text(piece): number for number, piece in enumerate(proto.pieces)}
    has_bytes = any(piece.type == BYTE for piece in proto.pieces)
    # sentencepiece joins unknown characters that follow each other, which there are where no bytes spell them.
    return models.BPE(
        vocab=vocab, merges=merges, unk_token=proto.trainer_spec.unk_piece, byte_fallback=has_bytes,
        fuse_unk=not has_bytes,
    )  # fmt: skip


def _unigram_model(proto: Any) -> models.Unigram:
    worst = min(piece.score for piece in proto.pieces if piece.type == NORMAL)
    longest = max(len(piece.piece) for piece in proto.pieces)
    # Below any way to spell the longest piece with single characters.
    never = (longest + 1) * (worst - _UNK_PENALTY)
    vocab = [(_text(piece), piece.score if piece.type == NORMAL else never) for piece in proto.pieces]
    unk = next(number for number, piece in enumerate(proto.pieces) if piece.type == UNKNOWN)
    return models.Unigram(vocab, unk_id=unk, byte_fallback=any(piece.type == BYTE for piece in proto.pieces))
