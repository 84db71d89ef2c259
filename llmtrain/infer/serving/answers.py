"""Answers in OpenAI's form."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llmtrain.infer.batching.sampling import LogProbs
from llmtrain.infer.serving.choices import TextPiece, WrittenText
from llmtrain.infer.text_model import TextModel
from llmtrain.infer.text_stream import INCOMPLETE, decode_with_names


def usage(prompt_tokens: int, choices: Sequence[WrittenText]) -> dict[str, int]:
    new = sum(len(choice.tokens) for choice in choices)
    return {"prompt_tokens": prompt_tokens, "completion_tokens": new, "total_tokens": prompt_tokens + new}


@dataclass(frozen=True)
class Form:
    """How the parts of one answer look: the model's name, what it is, and how its logarithms are told."""

    model: TextModel
    name: str
    kind: str
    """text_completion or chat.completion."""
    likely: int | None
    """Likeliest tokens told with each token; None: no probabilities."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def is_chat(self) -> bool:
        return self.kind == "chat.completion"

    def envelope(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        prefix, kind = ("chatcmpl", self.kind) if self.is_chat else ("cmpl", self.kind)
        return {
            "id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.name,
            "choices": choices, **more,
        }  # fmt: skip

    def whole(self, choices: Sequence[WrittenText], prefixes: Sequence[str]) -> list[dict[str, Any]]:
        """Finished texts behind what is echoed before each."""
        found = []
        for index, (choice, prefix) in enumerate(zip(choices, prefixes, strict=True)):
            told = self.logprobs(choice.tokens, choice.logprobs, len(prefix))
            said: dict[str, Any] = {"index": index, "finish_reason": choice.ending, "logprobs": told}
            if self.is_chat:
                said["message"] = {"role": "assistant", "content": choice.text, "refusal": None}
            else:
                said["text"] = prefix + choice.text
            found.append(said)
        return found

    def piece(self, piece: TextPiece, offset: int) -> dict[str, Any]:
        """A part of one text that stands behind so many characters of it."""
        told = self.logprobs(piece.tokens, piece.logprobs, offset)
        said: dict[str, Any] = {"index": piece.place, "finish_reason": piece.ending, "logprobs": told}
        if self.is_chat:
            said["delta"] = {"content": piece.text} if piece.text or not piece.ending else {}
        else:
            said["text"] = piece.text
        return said

    def logprobs(self, tokens: Sequence[int], logs: Sequence[LogProbs], offset: int) -> dict[str, Any] | None:
        if self.likely is None:
            return None
        pairs = list(zip(tokens, logs, strict=False))
        if self.is_chat:
            return {"content": [self._told(token, each) for token, each in pairs], "refusal": None}
        names = [self._name(token) for token, _ in pairs]
        offsets = [offset + sum(map(len, names[:number])) for number in range(len(names))]
        likeliest = [{self._name(token): log for token, log in each.likeliest} for _, each in pairs]
        return {
            "tokens": names, "token_logprobs": [each.chosen for _, each in pairs], "text_offset": offsets,
            "top_logprobs": likeliest if self.likely else None,
        }  # fmt: skip

    def _told(self, token: int, log: LogProbs) -> dict[str, Any]:
        return {
            **self._entry(token, log.chosen),
            "top_logprobs": [self._entry(*each) for each in log.likeliest[: self.likely]],
        }

    def _entry(self, token: int, log: float) -> dict[str, Any]:
        known = self.model.token_bytes or []
        spelled = known[token] if token < len(known) else b""
        return {"token": self._name(token), "logprob": log, "bytes": list(spelled) or None}

    def _name(self, token: int) -> str:
        """The token's text; of one that is no whole character, or gives none, as the tokenizer writes it."""
        text = decode_with_names([token], self.model.tokenizer, self.model.named.sentinels)
        if text and INCOMPLETE not in text:
            return text
        pieces = self.model.tokenizer.pieces
        return pieces[token] if token < len(pieces) else f"<{token}>"
