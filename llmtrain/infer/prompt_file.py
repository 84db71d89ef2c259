"""Files of prompts: a line of JSON for each, and what a batch is asked for by it."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from llmtrain.errors import ConfigError, DataError, LlmtrainError
from llmtrain.files import iter_lines, parse_json
from llmtrain.infer.batching.sampling import Sampling
from llmtrain.infer.text_model import PromptIds, TextModel

SAMPLING_KEYS = tuple(field.name for field in fields(Sampling))
OF_TEXTS = (*(key for key in SAMPLING_KEYS if key != "top_k"), "max_tokens", "stop")
"""Keys, and options of the command, of texts that are written. Of fillings, `top_k` is the number."""
NO_TEXT = "an encoder fills masks: nothing is drawn or written on. Leave it out."
ANSWER_KEYS = ("text", "ending", "prompt_tokens", "new_tokens", "fillings")
"""Keys of an answer, which no prompt may have."""
NUM_SHOWN = 10
"""Faults of a file that are told."""


@dataclass(frozen=True)
class Writing:
    """How a text is written, where its line does not say otherwise."""

    sampling: Sampling
    max_tokens: int
    stops: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises ConfigError for a stop string without a character."""
        if not all(self.stops):
            raise ConfigError("--stop: is empty, and every text would end before it began. Leave it out.")


@dataclass(frozen=True)
class PromptLine:
    """One line: its number from 0, what it says, its ids, and how to go on. An encoder's has no ids."""

    number: int
    content: Mapping[str, Any]
    ids: PromptIds | None
    how: Writing


@dataclass(frozen=True)
class PromptFile:
    """Lines with `prompt`, a text, or `messages` (and `tools`), a conversation; `how` is for those that say no more."""

    path: Path
    model: TextModel
    how: Writing

    def require_good(self) -> tuple[int, str]:
        """The number of lines and the file's sha256. Raises DataError that names the first bad lines, ConfigError where
        there is no such file."""
        digest, count, faults = hashlib.sha256(), 0, list[str]()
        for number, line in self._lines():
            digest.update(line)
            count += 1
            try:
                self._parsed(number, line)
            except LlmtrainError as error:
                faults.append(f"{self.path}:{number + 1}: {error}")
            if len(faults) == NUM_SHOWN:
                faults.append("Further lines were not looked at.")
                break
        if faults:
            raise DataError("\n".join(faults))
        if not count:
            raise DataError(f"{self.path}: has no line. Give one JSON object a line, with prompt or messages.")
        return count, digest.hexdigest()

    def iter_from(self, first: int) -> Iterator[PromptLine]:
        """The lines from a number on."""
        for number, line in self._lines():
            if number >= first:
                yield self._parsed(number, line)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        try:
            yield from enumerate(iter_lines(self.path))
        except OSError as error:
            raise ConfigError(f"--prompts {self.path}: cannot be read: {error.strerror}.") from None

    def _parsed(self, number: int, line: bytes) -> PromptLine:
        try:
            content = parse_json(line)
            # It is written again with its answer; JSON has no NaN, and Python's reader takes it and makes infinities.
            json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
        except ValueError as error:
            raise DataError(f"is no JSON that can be read and written: {error}.") from None
        if not isinstance(content, dict) or ("prompt" in content) == ("messages" in content):
            raise DataError("must be an object with either prompt, a text, or messages, a list.")
        if taken := sorted(content.keys() & set(ANSWER_KEYS)):
            raise DataError(f"{taken[0]}: is a key of the answer. Give it another name.")
        how = self._how(content)
        if not self.model.continues:
            if unknown := [key for key in OF_TEXTS if key in content]:
                raise DataError(f"{unknown[0]}: {NO_TEXT}")
            self.model.fillings(self._text(content), count=1)
            return PromptLine(number, content, None, how)
        if "messages" in content:
            return PromptLine(number, content, self.model.answer(content), how)
        return PromptLine(number, content, self.model.continuation(self._text(content)), how)

    def _text(self, content: Mapping[str, Any]) -> str:
        text = content.get("prompt")
        if not isinstance(text, str):
            raise DataError("prompt: must be a text; messages are for models that were trained on conversations.")
        return text

    def _how(self, content: Mapping[str, Any]) -> Writing:
        """What the line says of sampling, length and stop strings, over what holds for all."""
        kinds: dict[str, Any] = {"top_k": int, "seed": int}
        given = {key: _number(content, key, kinds.get(key, float)) for key in SAMPLING_KEYS if key in content}
        max_tokens = _number(content, "max_tokens", int) if "max_tokens" in content else self.how.max_tokens
        if max_tokens < 1:
            raise DataError(f"max_tokens: {max_tokens}: must be 1 or more.")
        stops = content.get("stop", self.how.stops)
        stops = (stops,) if isinstance(stops, str) else stops
        if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) and stop for stop in stops):
            raise DataError("stop: must be a text or a list of texts, none of them empty.")
        return Writing(replace(self.how.sampling, **given), int(max_tokens), tuple(stops))


def _number(content: Mapping[str, Any], key: str, kind: type) -> Any:
    value = content[key]
    if isinstance(value, bool) or not isinstance(value, (int, kind)):
        raise DataError(f"{key}: must be a{' whole' if kind is int else ''} number, is {value!r:.40}.")
    return value
