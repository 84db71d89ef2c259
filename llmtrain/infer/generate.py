"""Text from a model, as it is written; and of an encoder, fillings of masks."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmtrain.infer.batching.request import Request
from llmtrain.infer.batching.scheduler import Limits
from llmtrain.infer.chat import said_with
from llmtrain.infer.model import TrainedModel
from llmtrain.infer.prompt_file import Writing
from llmtrain.infer.text_model import PromptIds, TextModel
from llmtrain.models.transformer import Transformer

NUM_FILLINGS = 5


@dataclass(frozen=True)
class Asked:
    """A prompt: a text to continue or to fill, or with `chat` what a user says, behind the messages of a JSON file."""

    text: str
    chat: bool = False
    earlier: Path | None = None


def answer_of(model: TextModel, asked: Asked, how: Writing) -> Iterator[str]:
    """The pieces of the text: a continuation, an answer, or of an encoder the fillings of each mask.

    Raises ConfigError where the prompt is none for this model.
    """
    if asked.chat:
        yield from continued(model, model.answer(said_with(asked.text, asked.earlier)), how)
    elif model.continues:
        yield from continued(model, model.continuation(asked.text), how)
    else:
        yield from _fillings(model, asked.text, how.sampling.top_k or NUM_FILLINGS)


def continued(model: TextModel, prompt: PromptIds, how: Writing) -> Iterator[str]:
    """The pieces of one text, and the end of its last line."""
    stream = model.stream(how.stops)
    for token in iter_tokens(model.trained, model.request(prompt, how.max_tokens, how.sampling)):
        yield stream.push(token)
        if stream.stopped:
            break
    yield f"{stream.end()}\n"


def iter_tokens(model: Transformer | TrainedModel, request: Request) -> Iterator[int]:
    """The new tokens of one request, without the one that ends it. The caller may stop asking at any time."""
    trained = model if isinstance(model, TrainedModel) else TrainedModel(model, None)
    config = trained.model.config
    positions = min(config.max_seq_len, len(request.prompt) + request.max_tokens)
    batch = trained.batch(Limits.of(config, 1, positions))
    batch.add(request)
    ending = None
    while ending is None:
        for new in batch.step():
            ending = new.ending
            if ending != "stop":
                yield new.token


def _fillings(model: TextModel, text: str, count: int) -> Iterator[str]:
    """The best fillings of each mask: probability, then the filling as JSON, so that spaces are seen."""
    name, fillings = model.fillings(text, count)
    for number, filling in enumerate(fillings):
        yield f"{name} {number + 1}\n"
        for token, probability in filling.tokens:
            yield f"  {probability:.4f}  {json.dumps(model.tokenizer.decode([token]), ensure_ascii=False)}\n"
