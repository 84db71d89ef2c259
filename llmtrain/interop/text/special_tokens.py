"""Tokens that text never gives, by the names that a text can spell them with: the mask, padding, sentinels."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count, takewhile
from typing import Any

from tokenizers import Tokenizer as HfTokenizer

from llmtrain.values.tokenizer import Around, Tokenizer

FIM_NAMES = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>")


@dataclass(frozen=True)
class NamedTokens:
    """Names and ids. `around` stands before and behind a text that an encoder is to read, where the tokenizer's file
    says so (BERT's [CLS] and [SEP]). `bos_ids` stand before every text that a model was trained on. Generation stops
    at each of `ends`."""

    eos_id: int
    bos_id: int | None = None
    mask: tuple[str, int] | None = None
    pad: tuple[str, int] | None = None
    sentinels: Mapping[str, int] = field(default_factory=dict)
    around: Around = ((), ())
    bos_ids: tuple[int, ...] = ()
    end_ids: tuple[int, ...] = ()
    is_chat: bool = False
    """Training had conversations."""
    is_alone: bool = False
    """A document of training saw nothing of one before it, though it may have stood behind it."""

    @property
    def ends(self) -> tuple[int, ...]:
        """All ids at which a text ends."""
        return self.end_ids or (self.eos_id,)

    @property
    def begin_id(self) -> int | None:
        """The token before a text of a decoder: what a document of training saw there. As with GPT-2, that is the end
        of another one, where it saw others; None where there is nothing."""
        return next(iter(self.bos_ids), None if self.is_alone else self.eos_id)

    @property
    def start_id(self) -> int:
        """The first token of an encoder-decoder's decoder: padding, as T5 has it."""
        return self.eos_id if self.pad is None else self.pad[1]

    def frame(self, family: str) -> Around:
        """The tokens before and behind a text that a model of this `model.family` reads, as in training."""
        match family:
            case "encoder":
                return self.around
            case "encoder_decoder":
                return self.bos_ids, (self.eos_id,)
            case _:
                return self.bos_ids, ()

    @property
    def all(self) -> dict[str, int]:
        """Mask, padding and sentinels."""
        return dict(found for found in (self.mask, self.pad) if found is not None) | dict(self.sentinels)


def sentinel_name(number: int) -> str:
    """The spelling of a sentinel in a text, as T5's tokenizer has it."""
    return f"<extra_id_{number}>"


def named_tokens(tokenizer: Tokenizer, data: Mapping[str, Any] | None = None) -> NamedTokens:
    """The special tokens of a tokenizer, and those of training that a configuration's data section names."""
    given = (data or {}).get("special_tokens") or {}
    pieces = tokenizer.pieces

    def named(token: int | None, name: str) -> tuple[str, int] | None:
        if token is None:
            return None
        return (pieces[token] if token < len(pieces) and pieces[token] else name), token

    ids = given.get("sentinels")
    if ids is None:
        found = (tokenizer.special_id(sentinel_name(number)) for number in count())
        ids = list(takewhile(lambda token: token is not None, found))
    names = FIM_NAMES if (data or {}).get("objective") == "fim" else map(sentinel_name, count())
    sentinels = [named(token, name) for token, name in zip(ids, names, strict=False)]
    return NamedTokens(
        tokenizer.eos_id,
        tokenizer.bos_id,
        named(_either(given.get("mask"), tokenizer.mask_id), "<mask>"),
        named(_either(given.get("pad"), tokenizer.pad_id), "<pad>"),
        dict(filter(None, sentinels)),
        tokenizer.around,
        tokenizer.bos_ids,
        tokenizer.end_ids,
        is_chat := (data or {}).get("objective") == "chat",
        is_chat or (data or {}).get("reset_attention") is True,
    )


def _either(first: int | None, second: int | None) -> int | None:
    return second if first is None else first


def around_of(tokenizer: HfTokenizer) -> Around:
    """The tokens that a tokenizer by itself puts before and behind a text."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    plain, whole = tokenizer.encode("a", add_special_tokens=False).ids, tokenizer.encode("a").ids
    for start in range(len(whole) - len(plain) + 1):
        if plain and whole[start : start + len(plain)] == plain:
            return tuple(whole[:start]), tuple(whole[start + len(plain) :])
    return (), ()
