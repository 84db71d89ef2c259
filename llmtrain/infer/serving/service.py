"""What the server can be asked: prompts of calls, what is computed for them, and their limits."""

import asyncio
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

from llmtrain.errors import ConfigError, DataError
from llmtrain.infer.batching.request import Request
from llmtrain.infer.guides import JsonGuide, JsonGuides
from llmtrain.infer.serving.asked import (
    DEFAULT_NEW_TOKENS,
    AskedChat,
    AskedCompletion,
    AskedError,
    ServingLimits,
    Written,
)
from llmtrain.infer.serving.batch_thread import BatchThread
from llmtrain.infer.serving.choices import Arrivals, Choices
from llmtrain.infer.serving.metrics import ServingMetrics
from llmtrain.infer.text_model import PromptIds, TextModel

Result = TypeVar("Result")


@dataclass(frozen=True)
class Call:
    """Requests of one call, what is echoed before each text, and the number of tokens of its prompts."""

    requests: list[Request]
    prefixes: list[str]
    prompt_tokens: int
    likely: int | None
    stops: tuple[str, ...]


class Service:
    """A model with a name, and the thread that writes with it."""

    def __init__(self, model: TextModel, name: str, batch: BatchThread, limits: ServingLimits) -> None:
        self.model, self.name, self.batch, self.limits = model, name, batch, limits
        self._arrivals: Arrivals | None = None
        self.metrics = ServingMetrics()
        self.metrics.watch("open_texts", "Texts that are being written or wait", lambda: batch.num_open)
        self.metrics.watch("room", "Texts that may be written or wait", lambda: batch.room)

    def require_model(self, name: str | None) -> None:
        """Raises AskedError for another model than this one."""
        if name is not None and name != self.name:
            told = f"The model {name[:200]!r} is not here. There is {self.name!r}."
            raise AskedError(told, "model", 404, "model_not_found")

    def completion(self, asked: AskedCompletion) -> Call:
        """Raises AskedError."""
        self._require_writing()
        if asked.best_of not in (None, asked.n or 1):
            raise AskedError("best_of: must be n: texts are not chosen among.", "best_of")
        if asked.echo and asked.logprobs is not None:
            raise AskedError("echo: does not go with logprobs: those of prompts are not told.", "echo")
        given = several("prompt", asked.prompt)
        prompts = [self._completion_prompt(place, each) for place, each in given.items()]
        decode = self.model.tokenizer.decode
        echoed = [each if isinstance(each, str) else decode(each) for each in given.values() if asked.echo]
        prefixes = echoed or [""] * len(prompts)
        return self._call(asked, "prompt", prompts, prefixes, asked.max_tokens or DEFAULT_NEW_TOKENS, asked.logprobs)

    def guide(self, asked: AskedChat) -> JsonGuide | None:
        """What holds an answer to its form. It may take seconds to make, in any thread. Raises AskedError."""
        schema = asked.response_format and asked.response_format.wanted
        if schema is None:
            return None
        return self.faults_as("response_format", lambda: self._guides.of_schema(schema))

    @cached_property
    def _guides(self) -> JsonGuides:
        return JsonGuides(self.model.tokenizer, self.model.config.vocabulary, self.model.ends)

    def chat(self, asked: AskedChat, guide: JsonGuide | None) -> Call:
        """Raises AskedError."""
        self._require_writing()
        self._require_chat()
        if guide is not None and asked.stop:
            raise AskedError("stop: does not go with response_format: an answer ends where its JSON does.", "stop")
        if asked.top_logprobs is not None and not asked.logprobs:
            raise AskedError("top_logprobs: goes with logprobs: true.", "top_logprobs")
        said: dict[str, Any] = {"messages": [plain_message(message) for message in asked.messages]}
        if asked.tools and asked.tool_choice != "none":
            said["tools"] = asked.tools
        prompt = self.faults_as("messages", lambda: self.model.answer(said))
        longest = asked.max_completion_tokens or asked.max_tokens or self.limits.max_tokens
        likely = (asked.top_logprobs or 0) if asked.logprobs else None
        call = self._call(asked, "messages", [prompt], [""], longest, likely)
        if guide is None:
            return call
        return replace(call, requests=[replace(request, guide=guide.copy()) for request in call.requests])

    def written(self, call: Call) -> Choices:
        """The texts of a call, as a context."""
        self.metrics.prompt(call.prompt_tokens)
        streams = [self.model.stream(call.stops) for _ in call.requests]
        loop = asyncio.get_running_loop()
        if self._arrivals is None or self._arrivals.loop is not loop:
            self._arrivals = Arrivals(loop)
        return Choices(self.batch, self.metrics, self._arrivals, call.requests, streams)

    def faults_as(self, place: str, work: Callable[[], Result]) -> Result:
        """What work returns; its errors are those of a field, or of one of its texts."""
        try:
            return work()
        except (ConfigError, DataError) as error:
            raise fault_of(place, error) from None

    def _require_writing(self) -> None:
        if not self.model.continues:
            raise AskedError("The model is an encoder: ask /v1/fill-mask or /v1/embeddings.", status=404)

    def _require_chat(self) -> None:
        try:
            assert self.model.chat
        except ConfigError:  # whose words are about files and options of the command
            text = "The model takes no conversations: it has no chat template, or is no decoder. Ask /v1/completions."
            raise AskedError(text, status=404) from None

    def _call(
        self,
        asked: Written,
        param: str,
        prompts: Sequence[PromptIds],
        prefixes: Sequence[str],
        max_tokens: int,
        likely: int | None,
    ) -> Call:
        limit = self.limits.max_tokens
        if max_tokens > limit:
            raise AskedError(f"max_tokens: {max_tokens}: must be at most {limit} here.", "max_tokens")
        count, seed = asked.n or 1, secrets.randbelow(1 << 63)
        if len(prompts) * count > self.batch.room:
            told = (
                f"{param}: {len(prompts)} prompts with n = {count} are more texts than the {self.batch.room} allowed."
            )
            raise AskedError(told, param)
        sampling = self.faults_as(param, lambda: asked.sampling(seed))
        requests = [
            self.model.request(prompt, max_tokens, sampling, text=text, logprobs=likely)
            for prompt in prompts
            for text in range(count)
        ]
        tokens = sum(prompt.num_tokens for prompt in prompts)
        repeated = [prefix for prefix in prefixes for _ in range(count)]
        return Call(requests, repeated, tokens, likely, asked.stops)

    def _completion_prompt(self, place: str, given: str | list[int]) -> PromptIds:
        def made() -> PromptIds:
            if isinstance(given, str):
                return self.model.continuation(given)
            return self.model.prompt(require_ids(given, self.model.config.vocabulary))

        return self.faults_as(place, made)


def several(field: str, given: str | Sequence[Any]) -> dict[str, Any]:
    """Texts, or lists of ids, by where they stand: `prompt`, or `prompt[0]` and so on where a field has several.

    Raises AskedError where there is none.
    """
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        return {field: given}
    if not given:
        raise AskedError(f"{field}: the list is empty.", field)
    return {f"{field}[{index}]": each for index, each in enumerate(given)}


def fault_of(place: str, error: Exception) -> AskedError:
    """An error of the model's, about a field or one of its texts."""
    told = str(error).removeprefix("--chat: ").removeprefix("--prompt: ")
    return AskedError(f"{place}: {told}", place.partition("[")[0])


def require_ids(ids: Sequence[int], vocabulary: int) -> list[int]:
    """Raises DataError for ids that are no tokens."""
    for token in ids:
        if not 0 <= token < vocabulary:
            raise DataError(f"the id {token} is no token: ids are from 0 to {vocabulary - 1}.")
    return list(ids)


def plain_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose content is a text. Raises AskedError for parts that are none."""
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    texts = list[str]()
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise AskedError("messages: parts of a content must be texts: {type: text, text: ...}.", "messages")
        texts.append(text)
    return {**message, "content": "".join(texts)}
