"""Answers to a file of prompts, written as they are found and gone on with where the writing stopped."""

import json
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llmtrain.errors import ConfigError
from llmtrain.files import iter_lines, open_to_go_on, parse_line, sealed_line
from llmtrain.infer.batching.request import NewToken
from llmtrain.infer.batching.scheduler import Limits
from llmtrain.infer.prompt_file import PromptLine, Writing
from llmtrain.infer.text_model import PromptIds, TextModel
from llmtrain.infer.text_stream import TextStream
from llmtrain.words import counted

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


def iter_answers(
    model: TextModel, lines: Iterator[PromptLine], limits: Limits
) -> Generator[dict[str, Any], None, None]:
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


class AnswerFile:
    """The file of answers, whose only writer is this process while it is entered; what is not finished has another
    name, and says in its first line what it belongs to."""

    def __init__(self, path: Path, about: Mapping[str, Any], overwrite: bool) -> None:
        """`about` is what all answers follow from: prompts, weights, settings. A link is followed."""
        self._path, self._about, self._overwrite = path.resolve(), about, overwrite
        self._unfinished = self._path.with_name(f"{self._path.name}.unfinished")
        self.num_written = 0
        """Answers that are there."""

    def __enter__(self) -> Self:
        """A last line that was cut short is removed.

        Raises ConfigError where the file is there, is no regular one or cannot be written, where another process is
        writing it, or what is there belongs to something else.
        """
        if self._path.exists() and not (self._overwrite and self._path.is_file()):
            advice = ", or give --overwrite." if self._path.is_file() else ": it is no regular file."
            raise ConfigError(f"--out {self._path}: exists already. Choose another name, remove it{advice}")
        try:
            self._file = open_to_go_on(self._unfinished)
        except OSError as error:
            told = f"{error.strerror or error}. Wait for it, or choose another name."
            raise ConfigError(f"--out {self._unfinished}: cannot be written: {told}") from None
        try:
            self._go_on()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def _go_on(self) -> None:
        whole, count = 0, 0
        for line in () if self._overwrite else iter_lines(self._unfinished):
            if not line.endswith(b"\n"):
                break
            if not whole and parse_line(line) != dict(self._about):
                changed = [key for key, value in self._about.items() if (parse_line(line) or {}).get(key) != value]
                raise ConfigError(
                    f"{self._unfinished}: has answers of other {', '.join(changed)}. Give those again, remove it, or "
                    "give --overwrite."
                )
            whole, count = whole + len(line), count + 1
        self._file.truncate(whole)
        if not whole:
            self._file.write(sealed_line(self._about))
            self._file.flush()
        self.num_written = max(0, count - 1)

    def to_go_on(self, total: int) -> str:
        """What to say of a file that is not finished."""
        done = f"{self.num_written:,} of {counted(total, 'answer')} are in {self._unfinished}"
        return f"{done}: the same command goes on from there"

    def write(self, answers: Generator[dict[str, Any], None, None], told: Callable[[dict[str, Any]], None]) -> None:
        """Append answers, each told when it is written, and give the file its name when there are no more."""
        with closing(answers):
            for answer in answers:
                self._file.write(json.dumps(answer, ensure_ascii=False).encode() + b"\n")
                self._file.flush()
                self.num_written += 1
                told(answer)
        whole = self._path.with_name(f".writing-{self._path.name}-{os.getpid()}")
        with whole.open("wb") as file:
            for number, line in enumerate(iter_lines(self._unfinished)):
                if number:
                    file.write(line)
        whole.replace(self._path)
        self._unfinished.unlink()
