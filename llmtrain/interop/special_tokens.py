"""Tokens that a tokenizer's file knows by name and that text never gives: masks, sentinels, beginnings and ends."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer

ROLES = {
    "mask_token": ("<mask>", "[MASK]"),
    "cls_token": ("<cls>", "[CLS]"),
    "sep_token": ("<sep>", "[SEP]"),
    "unk_token": ("<unk>", "[UNK]"),
}
"""Names of the settings of transformers' tokenizers, and what such tokens are called."""

_SENTINEL = re.compile(r"<extra_id_(\d+)>")


@dataclass(frozen=True)
class NamedTokens:
    """Ids by the name that a text spells them with. `around` stands before and behind a text that a model is to read,
    where the file says so."""

    mask: tuple[str, int] | None
    sentinels: tuple[int, ...]
    around: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    def by_name(self, sentinels: Sequence[int] = ()) -> dict[str, int]:
        """All of them; `sentinels` in place of those in the file."""
        numbered = enumerate(sentinels or self.sentinels)
        return {sentinel_name(number): token for number, token in numbered} | dict([self.mask] if self.mask else [])


def sentinel_name(number: int) -> str:
    """What a text calls a sentinel, as T5's tokenizer does."""
    return f"<extra_id_{number}>"


def named_tokens(path: Path) -> NamedTokens:
    """Those of a sentencepiece model or a tokenizer.json that has been loaded before."""
    if path.suffix == ".json":
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_padding()
        ids = tokenizer.get_vocab(with_added_tokens=True)
        plain, whole = tokenizer.encode("a", add_special_tokens=False).ids, tokenizer.encode("a").ids
        around = _around(plain, whole)
    else:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        ids, around = {model.id_to_piece(token): token for token in range(model.get_piece_size())}, ((), ())
    mask = next(((name, ids[name]) for name in ROLES["mask_token"] if name in ids), None)
    numbers = {int(found[1]): token for name, token in ids.items() if (found := _SENTINEL.fullmatch(name))}
    # Only those without a gap from the first on are sentinels in an order.
    length = next(number for number in range(len(numbers) + 1) if number not in numbers)
    return NamedTokens(mask, tuple(numbers[number] for number in range(length)), around)


def _around(plain: Sequence[int], whole: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What stands before and behind the plain tokens in the whole."""
    for start in range(len(whole) - len(plain) + 1):
        if plain and list(whole[start : start + len(plain)]) == list(plain):
            return tuple(whole[:start]), tuple(whole[start + len(plain) :])
    return (), ()
