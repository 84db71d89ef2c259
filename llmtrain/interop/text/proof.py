"""The proof that an exported tokenizer gives the ids of training, for plain text and for a user's prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from llmtrain.errors import ExportError
from llmtrain.values.tokenizer import Around, Tokenizer

NUM_GREEDY = 32
_PROMPT = 16
_LIKELY_CAUSE = (
    "A unigram model with scores that are not multiples of a power of two rounds differently in the two libraries: "
    "train the tokenizer again with `llmtrain data tokenizer`, or as bpe."
)


@dataclass(frozen=True)
class Prompt:
    """A string as ids of training, and as what transformers' tokenizer gives a model for it."""

    ids: tuple[int, ...]
    inputs: Mapping[str, Tensor]


@dataclass(frozen=True)
class ChatExample:
    """A conversation as a template takes it, and the ids that training gives it; `prompts`: an answer follows."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Any, ...] | None
    prompts: bool
    ids: tuple[int, ...]


@dataclass(frozen=True)
class ChatExamples:
    """What a model was trained to take part in: a template, the control tokens that it writes, and conversations."""

    template: str
    controls: frozenset[int]
    examples: tuple[ChatExample, ...]


@dataclass(frozen=True)
class TextReader:
    """An exported tokenizer beside the one of training."""

    folder: Path
    ours: Tokenizer
    frame: Around
    """The tokens that the exported tokenizer is to put before and behind a text."""

    @cached_property
    def theirs(self) -> Any:
        from transformers import AutoTokenizer  # here: a server of a run, which proves nothing, is not to wait for it

        return AutoTokenizer.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)

    def compare(self, texts: Sequence[str]) -> list[int]:
        """All ids of the texts, once both sides agree on them and on the text of them. Raises ExportError."""
        all_ids: list[int] = []
        spelled = [str(token) for token in self.theirs.added_tokens_decoder.values()]
        for text in texts:
            expected = self.ours.encode(text)
            plain = self.theirs.encode(text, add_special_tokens=False, verbose=False, split_special_tokens=True)
            self._require_equal(expected, plain)
            if not any(name in text for name in spelled):
                self._require_equal(self._framed(expected), self.theirs(text, verbose=False)["input_ids"])
            all_ids += expected
            if self.theirs.unk_token_id is not None and self.theirs.unk_token_id in expected:
                continue  # what is no token has no text either
            expected_text, actual_text = self.ours.decode(expected), self.theirs.decode(plain, skip_special_tokens=True)
            if actual_text != expected_text:
                raise ExportError(
                    f"The exported tokenizer decodes to {actual_text[:80]!r} what is {expected_text[:80]!r} for ours."
                )
        return all_ids

    def compare_chats(self, chats: ChatExamples) -> None:
        """Raises ExportError where transformers gives a conversation other ids than training."""
        for example in chats.examples:
            tools = None if example.tools is None else [dict(tool) for tool in example.tools]
            messages = [dict(message) for message in example.messages]
            try:
                found = self.theirs.apply_chat_template(
                    messages,
                    tools=tools,
                    add_generation_prompt=example.prompts,
                    return_dict=True,
                    tokenizer_kwargs={"verbose": False},
                )
            except Exception as error:  # of jinja and of transformers, without a common class
                raise ExportError(f"transformers cannot render a conversation with the template: {error}.") from error
            self._require_equal(example.ids, found["input_ids"])

    def prompt(self, text: str, max_seq_len: int) -> Prompt:
        """The longest beginning of a text that leaves room for a continuation. Raises ExportError where a user's call
        gives other ids than `llmtrain generate` has for it."""
        longest = max(1, min(_PROMPT, max_seq_len - NUM_GREEDY))
        ids = self._framed(self.ours.encode(text))
        while len(ids) > longest and len(text) > 1:
            text = text[: len(text) * 3 // 4]
            ids = self._framed(self.ours.encode(text))
        inputs = self.theirs(text, return_tensors="pt")
        self._require_equal(ids, inputs["input_ids"][0].tolist())
        return Prompt(tuple(ids), dict(inputs))

    def _framed(self, ids: Sequence[int]) -> list[int]:
        before, behind = self.frame
        return [*before, *ids, *behind]

    def _require_equal(self, expected: Sequence[int], actual: Sequence[int]) -> None:
        if list(actual) == list(expected):
            return
        pairs = enumerate(zip(expected, actual, strict=False))
        place = next((i for i, (one, other) in pairs if one != other), min(len(expected), len(actual)))
        before = self.ours.decode(expected[max(0, place - 8) : place])
        raise ExportError(
            f"The exported tokenizer differs at token {place}, after {before[-60:]!r}: "
            f"trained with {list(expected[place : place + 6])}, exported {list(actual[place : place + 6])}. "
            f"{_LIKELY_CAUSE}"
        )
