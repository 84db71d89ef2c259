"""Prompts with names of masks and sentinels in them, and text of tokens that spells such names."""

import re
from collections.abc import Mapping, Sequence

from llmtrain.values.tokenizer import Tokenizer


def encode_with_names(text: str, tokenizer: Tokenizer, names: Mapping[str, int]) -> list[int]:
    """The ids of a text, in which these names stand for tokens that ordinary text never gives."""
    if not names:
        return tokenizer.encode(text)
    cut = re.split("|".join(f"({re.escape(name)})" for name in sorted(names, key=len, reverse=True)), text)
    ids: list[int] = []
    for part in filter(None, cut):
        ids += [names[part]] if part in names else tokenizer.encode(part)
    return ids


def decode_with_names(ids: Sequence[int], tokenizer: Tokenizer, names: Mapping[str, int]) -> str:
    """The text of ids, named tokens spelled out."""
    spelled = {token: name for name, token in names.items()}
    text, run = "", list[int]()
    for token in ids:
        if token in spelled:
            text += (tokenizer.decode(run) if run else "") + spelled[token]
            run = []
        else:
            run.append(token)
    return text + (tokenizer.decode(run) if run else "")
