"""Text that grows with every token: whole characters, and nothing behind a stop string."""

import re
from collections.abc import Mapping, Sequence

from llmtrain.values.tokenizer import Tokenizer

CONTEXT = 16
"""Tokens that are decoded again with the next one, at most."""

INCOMPLETE = "\ufffd"
"""What bytes decode to that are no character, or none yet."""


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


class TextStream:
    """The text of tokens that come one at a time. With what `end` returns, the pieces are what all tokens decode to, up
    to the stop string that is complete first; `stopped` says that there was one."""

    def __init__(self, tokenizer: Tokenizer, names: Mapping[str, int], stops: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer, self._names, self._stops = tokenizer, names, [stop for stop in stops if stop]
        self._ids = list[int]()
        # Tokens are decoded behind some that have given text already: the first of a text may lose its space.
        self._start = self._shown = 0
        self._before = ""
        self._held = ""

    @property
    def has_stops(self) -> bool:
        return bool(self._stops)

    def push(self, *tokens: int) -> str:
        """The text that is certain with these tokens more."""
        if self.stopped:
            return ""
        self._ids += tokens
        return self._released(self._decoded(whole_characters=True), at_end=False)

    def end(self) -> str:
        """What was held back: bytes that are no character, and the beginning of a stop string."""
        if self.stopped:
            return ""
        return self._released(self._decoded(whole_characters=False), at_end=True)

    def _decoded(self, whole_characters: bool) -> str:
        text, before = decode_with_names(self._ids[self._start :], self._tokenizer, self._names), self._before
        if (whole_characters and text.endswith(INCOMPLETE)) or len(text) <= len(before):
            return ""
        self._before = text
        if len(self._ids) - self._start >= CONTEXT:
            self._start = self._shown
            self._before = decode_with_names(self._ids[self._start :], self._tokenizer, self._names)
        self._shown = len(self._ids)
        return text[len(before) :]

    def _released(self, new: str, at_end: bool) -> str:
        text = self._held + new
        # The one that is complete first, however tokens cut the text.
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        held = 0 if at_end else max((beginning_at_end(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def beginning_at_end(text: str, stop: str) -> int:
    """Characters at the end of a text with which a stop string begins."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
