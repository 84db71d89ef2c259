"""From a conversation to token ids, and to the tokens of it that are trained.

Whole runs of text between control tokens are tokenized together, as a reader does, and a span of characters is the
tokens that have one of them: a token that reaches over the begin of an answer belongs to it. That is what transformers'
`return_assistant_tokens_mask` gives.

What an answer is, a template says with `{% generation %}`. Of a template without it, the answer is what the template
writes for a message behind what it writes before the assistant begins; it must write the rest alike.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from llmtrain.data.chat.conversation import ASSISTANT, Conversation
from llmtrain.data.chat.template import ChatTemplate, Rendered
from llmtrain.errors import DataError
from llmtrain.values.tokenizer import Tokenizer

SpecialInText = Literal["error", "text"]

Bounds = tuple[int, int]

_MARKS = "Mark what is trained with {% generation %} ... {% endgeneration %} in the template"


@dataclass(frozen=True)
class EncodedConversation:
    """The text of a conversation, its ids, and spans [n, 2] of trained tokens in their order.

    `end_ids` are tokens that end a turn of it; `counts` how many tokens are trained by role.
    """

    text: str
    ids: NDArray[np.int64]
    spans: NDArray[np.int64]
    end_ids: frozenset[int]
    counts: Mapping[str, int]


class ChatEncoder:
    """Renders and tokenizes conversations with one template and one tokenizer."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer, special_in_text: SpecialInText = "error") -> None:
        """With `special_in_text` = text, what spells a control token in a message is ordinary text; else an error."""
        self.template, self.tokenizer = template, tokenizer
        self._special_in_text: SpecialInText = special_in_text

    def prompt(self, conversation: Conversation) -> list[int]:
        """The ids that an assistant's answer to a conversation follows. Raises DataError."""
        self._require_text(conversation)
        return self._tokens(self.template.render(conversation.messages, conversation.tools, prompts=True))[0]

    def encode(self, conversation: Conversation) -> EncodedConversation:
        """Raises DataError that begins with the conversation's place, where nothing or everything would be trained."""
        try:
            self._require_text(conversation)
            rendered = self.template.render(conversation.messages, conversation.tools)
            found = self._marked if self.template.marks_generation else self._written
            return self._encoded(conversation, rendered, list(found(conversation, rendered)))
        except DataError as error:
            raise conversation.fault(str(error)) from None

    def _require_text(self, conversation: Conversation) -> None:
        if self._special_in_text == "text":
            return
        for number, message in enumerate((*conversation.messages, *(conversation.tools or ()))):
            if (name := self.template.spelled_control(message)) is not None:
                place = f"message {number}" if number < len(conversation.messages) else "its tools"
                raise DataError(
                    f"{place} spells the control token {name}, which a user must not be able to give. Remove it, or "
                    "have it as ordinary text with --special-in-text text."
                )

    def _marked(self, conversation: Conversation, rendered: Rendered) -> Iterator[Bounds]:
        """The template's generation blocks, with the control token that follows one at once."""
        blocks = [(begin, end) for begin, end in rendered.blocks if begin < end]
        assistants = [number for number, message in enumerate(conversation.messages) if message["role"] == ASSISTANT]
        if len(conversation.trained) < len(assistants):
            if len(blocks) != len(assistants):
                raise DataError(
                    f"some of its {len(assistants)} answers are not to be trained, and the template writes "
                    f"{len(blocks)} generation blocks: which of them are meant, nothing says. Use one block an answer."
                )
            pairs = zip(assistants, blocks, strict=True)
            blocks = [block for number, block in pairs if number in conversation.trained]
        if not blocks:
            raise DataError("the template writes no generation block for it, so nothing would be trained.")
        following = {control.begin: control.end for control in rendered.controls}
        ends = {control.end for control in rendered.controls}
        for begin, end in blocks:
            yield begin, end if end in ends else following.get(end, end)

    def _written(self, conversation: Conversation, rendered: Rendered) -> Iterator[Bounds]:
        """What the template writes for each trained message, up to the control token that ends it."""
        for number in sorted(conversation.trained):
            before = self.template.render(conversation.messages[:number], conversation.tools, prompts=True)
            until = self.template.render(conversation.messages[: number + 1], conversation.tools)
            for shorter, longer, what in (
                (before.text, until.text, "what it writes before an answer (add_generation_prompt)"),
                (until.text, rendered.text, "the messages up to an answer"),
            ):
                if not longer.startswith(shorter):
                    pairs = enumerate(zip(shorter, longer, strict=False))
                    at = next((at for at, (one, other) in pairs if one != other), min(len(shorter), len(longer)))
                    raise DataError(
                        f"{self.template.name} does not begin message {number} with {what}: from character {at} on it "
                        f"has {longer[at : at + 30]!r} in place of {shorter[at : at + 30]!r}. {_MARKS}."
                    )
            begin = len(before.text)
            ends = [control.end for control in until.controls if control.begin >= begin]
            if not ends or until.text[ends[-1] :].strip():
                raise DataError(self._no_end(number))
            yield begin, ends[-1]

    def _no_end(self, number: int | None = None) -> str:
        which = "an answer" if number is None else f"message {number}"
        return (
            f"{self.template.name} ends {which} with no control token of {self.tokenizer.path}, so a model would never "
            "learn to stop. End what the assistant says with one, such as <|im_end|>; --control names tokens that "
            "reserved pieces are to be."
        )

    def _encoded(self, conversation: Conversation, rendered: Rendered, answers: list[Bounds]) -> EncodedConversation:
        ids, offsets = self._tokens(rendered)
        begins, ends = np.array(offsets, np.int64).reshape(-1, 2).T
        bounds = np.array(answers, np.int64).reshape(-1, 2)
        spans = np.stack((ends.searchsorted(bounds[:, 0], "right"), begins.searchsorted(bounds[:, 1], "left")), axis=1)
        spans[1:, 0] = np.maximum(spans[1:, 0], spans[:-1, 1])  # a token that two answers share is of the first
        spans = spans[spans[:, 0] < spans[:, 1]]
        trained = int((spans[:, 1] - spans[:, 0]).sum())
        if not trained:
            raise DataError("no token of it is trained: what the assistant says is empty. Leave it out.")
        if trained == len(ids):
            raise DataError("all of its tokens are trained: the template writes nothing but what an assistant says.")
        controls = {control.token for control in rendered.controls}
        lasts = np.array(ids, np.int64)[spans[:, 1] - 1].tolist()
        if lasts[-1] not in controls:
            raise DataError(self._no_end())
        counts = Counter({str(message["role"]): 0 for message in conversation.messages})
        counts[ASSISTANT] = trained
        return EncodedConversation(
            rendered.text, np.array(ids, np.int64), spans, frozenset(lasts) & controls, dict(counts)
        )

    def _tokens(self, rendered: Rendered) -> tuple[list[int], list[Bounds]]:
        """The ids of a text, and the characters of each."""
        if self.tokenizer.reads_names and not rendered.spells_control:
            return self.tokenizer.encode_with_offsets(rendered.text, spelled=True)
        ids, offsets, place = list[int](), list[Bounds](), 0
        for begin, end, token in [*((c.begin, c.end, c.token) for c in rendered.controls), (len(rendered.text), 0, -1)]:
            if begin > place:
                found, within = self.tokenizer.encode_with_offsets(rendered.text[place:begin])
                ids += found
                offsets += [(place + first, place + last) for first, last in within]
            if token >= 0:
                ids.append(token)
                offsets.append((begin, end))
            place = end
        return ids, offsets


def template_variables(tokenizer: Tokenizer) -> dict[str, str]:
    """The names of special tokens that a template may use, such as bos_token."""
    pieces, roles = tokenizer.pieces, ("bos", "eos", "pad")
    ids: dict[str, Any] = {f"{role}_token": getattr(tokenizer, f"{role}_id") for role in roles}
    return {name: pieces[token] for name, token in ids.items() if token is not None and token < len(pieces)}


def control_names(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of the tokens that a template may write and no text gives, by their names."""
    pieces = tokenizer.pieces
    return {pieces[token]: token for token in np.flatnonzero(tokenizer.special).tolist() if pieces[token]}
