"""Answers that a model writes to many prompts, through a continuous batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llmtrain.infer.batching.batch import ContinuousBatch
from llmtrain.infer.batching.sampling import Sampling
from llmtrain.infer.batching.scheduler import Limits
from llmtrain.infer.text_model import PromptIds, TextModel
from llmtrain.infer.text_stream import TextStream

SLOTS = 8
GREEDY = Sampling(0)


@dataclass(frozen=True)
class Answering:
    """How answers are written: at most so many tokens, up to the first of the stop strings."""

    max_tokens: int
    stops: tuple[str, ...] = ()
    sampling: Sampling = GREEDY


def iter_answers(model: TextModel, prompts: Sequence[PromptIds], answering: Answering) -> Iterator[tuple[int, str]]:
    """The place of each prompt with its answer, as they are done; prompts are among those of `TextModel.prompt`."""
    if not prompts:
        return
    positions = max(len(prompt.ids) for prompt in prompts) + answering.max_tokens
    positions = min(positions, model.config.max_seq_len)
    batch = ContinuousBatch(model.model, Limits.of(model.config, min(SLOTS, len(prompts)), positions))
    texts, streams, places = [""] * len(prompts), dict[int, TextStream](), dict[int, int]()
    for place, prompt in enumerate(prompts):
        number = batch.add(model.request(prompt, answering.max_tokens, answering.sampling))
        streams[number], places[number] = model.stream(answering.stops), place
    while not batch.is_idle:
        for new in batch.step():
            stream, place = streams[new.request], places[new.request]
            if new.ending != "stop":
                texts[place] += stream.push(new.token)
            if new.ending is None and not stream.stopped:
                continue
            if new.ending is None:
                batch.cancel(new.request)
            texts[place] += stream.end()
            yield place, texts[place]
