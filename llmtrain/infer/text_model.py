"""A model that writes, and its tokenizer: from texts and conversations to requests, and from tokens to text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llmtrain.data.chat.encoding import ChatEncoder
from llmtrain.data.tasks.metrics import LogLikelihood
from llmtrain.data.tasks.tokens import ScoredText
from llmtrain.errors import ConfigError
from llmtrain.infer.batching.request import Request
from llmtrain.infer.batching.sampling import Sampling
from llmtrain.infer.chat import chat_encoder, chat_prompt
from llmtrain.infer.fillings import Filling
from llmtrain.infer.model import TrainedModel
from llmtrain.infer.sharded.works import Embedding, MaskFilling, TextScoring
from llmtrain.infer.text_stream import TextStream, encode_with_names
from llmtrain.infer.token_bytes import token_bytes
from llmtrain.interop.text.special_tokens import named_tokens


@dataclass(frozen=True)
class PromptIds:
    """Ids that a model goes on from; of an encoder-decoder, `source` is what its encoder reads."""

    ids: tuple[int, ...]
    source: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens of what was given."""
        return len(self.source or self.ids)


class TextModel:
    """A trained model and its tokenizer. Raises ConfigError for a model that writes no text."""

    def __init__(self, trained: TrainedModel, tokenizer: Path | None = None) -> None:
        self.trained, self.model = trained, trained.model
        self.config = trained.model.config
        if self.config.predicts_labels:
            raise ConfigError(
                f"model.head = {self.config.head}: the model says what a text is, and does not write any. Export it, "
                "and ask the pipeline that the export's README.md shows."
            )
        self.tokenizer = trained.tokenizer_or(tokenizer)
        self.named = named_tokens(self.tokenizer, trained.data)
        self.ends = frozenset(self.named.ends)

    @cached_property
    def token_bytes(self) -> list[bytes] | None:
        """What each id adds to a text; None where that cannot be said byte by byte."""
        try:
            return token_bytes(self.tokenizer)
        except ConfigError:
            return None

    @property
    def continues(self) -> bool:
        """True where it writes on; an encoder fills masks."""
        return self.config.family != "encoder"

    @cached_property
    def chat(self) -> ChatEncoder:
        """Raises as `chat_encoder`, and ConfigError where it is no decoder."""
        if self.config.family != "decoder":
            raise ConfigError(f"--chat: goes with a decoder, and the model is an {self.config.family}.")
        return chat_encoder(self.tokenizer)

    def continuation(self, text: str) -> PromptIds:
        """The prompt of a text, in which sentinels are spelled by their names."""
        return self.prompt(self.framed(text))

    def framed(self, text: str) -> list[int]:
        """The ids of a text between what stands before and behind one."""
        before, behind = self.named.frame(self.config.family)
        return [*before, *encode_with_names(text, self.tokenizer, self.named.sentinels), *behind]

    def answer(self, said: Mapping[str, Any]) -> PromptIds:
        """The prompt of a conversation, an object with `messages` and perhaps `tools`, whose next message is asked for.

        Raises DataError for what is no conversation.
        """
        return self.prompt(chat_prompt(self.chat, said))

    def prompt(self, ids: Sequence[int]) -> PromptIds:
        """Ids behind the places of a soft prompt, whose embeddings the model replaces.

        Raises ConfigError where there are none, or they leave no room.
        """
        whole = (*[0] * self.model.prompt_tokens, *ids)
        limit = self.config.max_seq_len
        encodes = self.config.family == "encoder_decoder"
        if not 0 < len(whole) < limit + encodes:
            bound = "at most" if encodes else "fewer than"
            raise ConfigError(
                f"The prompt has {len(whole)} tokens: give it at least 1 and {bound} {limit} (model.max_seq_len)."
            )
        return PromptIds((self.named.start_id,), whole) if encodes else PromptIds(whole)

    def request(self, prompt: PromptIds, max_tokens: int, sampling: Sampling, **more: Any) -> Request:
        """What a batch is asked for; `more` are fields of `Request`."""
        return Request(prompt.ids, max_tokens, sampling, self.ends, source=prompt.source, **more)

    def stream(self, stops: Sequence[str] = ()) -> TextStream:
        """The text of one answer's tokens."""
        return TextStream(self.tokenizer, self.named.sentinels, stops)

    def fillings(self, text: str, count: int) -> tuple[str, list[Filling]]:
        """The mask's name, and the best fillings of each mask of a text. Raises ConfigError where there is none."""
        if self.named.mask is None:
            raise ConfigError(
                f"{self.tokenizer.path}: has no mask token, so there is nothing that an encoder could fill."
            )
        name, mask_id = self.named.mask
        if name not in text:
            raise ConfigError(f"--prompt: an encoder fills masks. Put {name} where a token is to be found.")
        before, behind = self.named.around
        ids = [*(self.named.bos_ids or before), *encode_with_names(text, self.tokenizer, {name: mask_id}), *behind]
        return name, self.trained.do(MaskFilling(self._behind_prompt("The prompt", ids), mask_id, count))

    def embedding(self, ids: Sequence[int]) -> list[float]:
        """The vector of a text. Raises ConfigError for no tokens, and for more than the model can read."""
        whole = self._behind_prompt("The text", ids)
        return self.trained.do(Embedding(whole, len(whole) - len(ids))).tolist()

    def log_likelihoods(self, texts: Sequence[ScoredText]) -> list[LogLikelihood]:
        """How likely the scored ids of each text are; there is room for them."""
        prompt, encodes = self.model.prompt_tokens, self.config.family == "encoder_decoder"
        return self.trained.do(TextScoring([text.behind(prompt, encodes) for text in texts]))

    def _behind_prompt(self, what: str, ids: Sequence[int]) -> list[int]:
        whole, limit = [*[0] * self.model.prompt_tokens, *ids], self.config.max_seq_len
        if not ids or len(whole) > limit:
            raise ConfigError(
                f"{what} has {len(whole)} tokens: give it at least 1 and at most {limit} (model.max_seq_len)."
            )
        return whole
