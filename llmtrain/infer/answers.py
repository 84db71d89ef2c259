"""Answers to a file of prompts, written as they are found and gone on with where the writing stopped."""

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.errors import ConfigError
from llmtrain.files import iter_lines, parse_line, sealed_line
from llmtrain.infer.batching.request import NewToken
from llmtrain.infer.batching.scheduler import Limits
from llmtrain.infer.prompt_file import PromptLine, Writing
from llmtrain.infer.text_model import PromptIds, TextModel
from llmtrain.infer.text_stream import TextStream

SLOTS = 8
"""Of a batch whose prompts are known."""
AHEAD = 8
"""Prompts for each slot that may be answered before one that comes first."""
NUM_FILLINGS = 5


@dataclass
class Open:
    """A line that is being answered."""

    line: PromptLine
    stream: TextStream
    text: str = ""
    tokens: int = 0

    def answered(self, ending: str) -> dict[str, Any]:
        assert self.line.ids is not None
        counts = {"prompt_tokens": self.line.ids.num_tokens, "new_tokens": self.tokens}
        return {**self.line.content, "text": self.text, "ending": ending, **counts}


def iter_answers(model: TextModel, lines: Iterator[PromptLine], limits: Limits) -> Iterator[dict[str, Any]]:
    """An object for each line, in their order: what the line says, the text, why it ended and its numbers of tokens;
    of an encoder the fillings of its masks."""
    if not model.continues:
        for line in lines:
            yield {**line.content, "fillings": _fillings(model, line)}
        return
    batch, opened, done = model.trained.batch(limits), dict[int, Open](), dict[int, dict[str, Any]]()
    order = deque[int]()  # requests whose answers were not given out yet
    while True:
        while len(opened) < 2 * limits.slots and len(order) < AHEAD * limits.slots:
            if (line := next(lines, None)) is None:
                break
            assert line.ids is not None
            # The number of the line, so that equal prompts of one seed have answers of their own.
            request = model.request(line.ids, line.how.max_tokens, line.how.sampling, text=line.number)
            order.append(batch.add(request))
            opened[order[-1]] = Open(line, model.stream(line.how.stops))
        if not order:
            return
        for new in batch.step():
            if (answer := _grown(opened[new.request], new)) is not None:
                del opened[new.request]
                batch.cancel(new.request)
                done[new.request] = answer
        while order and order[0] in done:
            yield done.pop(order.popleft())


def iter_texts(model: TextModel, prompts: Sequence[PromptIds], how: Writing) -> Iterator[str]:
    """The text of the answer to each prompt, in their order; prompts are among those of `TextModel.prompt`."""
    if not prompts:
        return
    positions = min(max(len(prompt.ids) for prompt in prompts) + how.max_tokens, model.config.max_seq_len)
    limits = Limits.of(model.config, min(SLOTS, len(prompts)), positions)
    lines = (PromptLine(number, {}, prompt, how) for number, prompt in enumerate(prompts))
    for answer in iter_answers(model, lines, limits):
        yield answer["text"]


def _grown(answer: Open, new: NewToken) -> dict[str, Any] | None:
    """Take in a token; the answer where it has ended."""
    if new.ending != "stop":
        answer.text += answer.stream.push(new.token)
        answer.tokens += 1
    if new.ending is not None:
        answer.text += answer.stream.end()
    if answer.stream.stopped:
        return answer.answered("stop")
    return None if new.ending is None else answer.answered(new.ending)


def _fillings(model: TextModel, line: PromptLine) -> list[list[dict[str, Any]]]:
    _, found = model.fillings(line.content["prompt"], line.how.sampling.top_k or NUM_FILLINGS)
    return [
        [{"text": model.tokenizer.decode([token]), "probability": share} for token, share in filling.tokens]
        for filling in found
    ]


@dataclass(frozen=True)
class AnswerFile:
    """The file of answers; what is not finished has another name, and says in its first line what it belongs to."""

    path: Path
    about: Mapping[str, Any]
    """What all answers follow from: prompts, weights, settings."""

    @property
    def unfinished(self) -> Path:
        return self.path.with_name(f"{self.path.name}.unfinished")

    def num_written(self, overwrite: bool) -> int:
        """Answers that are there already; a last line that was cut short is removed.

        Raises ConfigError where the file is there, or what is there belongs to something else.
        """
        if self.path.exists() and not overwrite:
            raise ConfigError(
                f"--out {self.path}: exists already. Choose another name, remove it, or give --overwrite."
            )
        if overwrite or not self.unfinished.exists():
            self.unfinished.parent.mkdir(parents=True, exist_ok=True)
            self.unfinished.write_bytes(sealed_line(self.about))
            return 0
        whole, count = 0, 0
        for line in iter_lines(self.unfinished):
            if not line.endswith(b"\n"):
                break
            if not whole and parse_line(line) != dict(self.about):
                changed = [key for key, value in self.about.items() if (parse_line(line) or {}).get(key) != value]
                raise ConfigError(
                    f"{self.unfinished}: has answers of other {', '.join(changed)}. Give those again, remove it, or "
                    "give --overwrite."
                )
            whole, count = whole + len(line), count + 1
        os.truncate(self.unfinished, whole)
        return max(0, count - 1)

    def write(self, answers: Iterator[dict[str, Any]], told: Callable[[dict[str, Any]], None]) -> None:
        """Append answers, each told when it is written, and give the file its name when there are no more."""
        with self.unfinished.open("ab") as file, closing(answers):  # type: ignore[arg-type]  # a generator closes
            for answer in answers:
                file.write(json.dumps(answer, ensure_ascii=False).encode() + b"\n")
                file.flush()
                told(answer)
        whole = self.path.with_name(f".writing-{self.path.name}-{os.getpid()}")
        with whole.open("wb") as file:
            for number, line in enumerate(iter_lines(self.unfinished)):
                if number:
                    file.write(line)
        whole.replace(self.path)
        self.unfinished.unlink()
