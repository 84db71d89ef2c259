"""The samples of a task: JSON lines, and the texts that its templates make of them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from llmtrain.config.tasks.schema import GENERATED, TaskConfig
from llmtrain.config.tasks.template import Template
from llmtrain.errors import DataError, PathError
from llmtrain.files import iter_lines, parse_json

MOST_SHOWN = 10
"""Faulty lines that an error names."""
LONGEST_LINE = 1 << 26


@dataclass(frozen=True)
class TaskSample:
    """One sample as texts. `continuations` are what may follow the prompt, with what stands between them; of
    perplexity, the text behind an empty prompt. `answers` are the right ones, `choices` what a choice is without what
    stands before it."""

    number: int
    prompt: str
    continuations: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    target: int = 0
    """The right continuation."""
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskTemplates:
    """The templates of a task, read once."""

    task: TaskConfig

    @cached_property
    def prompt(self) -> Template:
        return Template.of(self.task.prompt)

    @cached_property
    def answer(self) -> Template:
        return Template.of(self.task.answer)

    @cached_property
    def choices(self) -> list[Template]:
        return [Template.of(text) for text in self.task.choices]

    def sample(self, number: int, found: Mapping[str, Any], before: str) -> TaskSample:
        """The texts of a sample, behind the task's examples. Raises ValueError."""
        task, prompt = self.task, self.prompt.text(found)
        if task.kind == "perplexity":
            if not prompt:
                raise ValueError("has no text.")
            return TaskSample(number, "", (prompt,))
        prompt = before + prompt
        if task.kind == "choices":
            choices = self._choices(found)
            target = self._target(found, choices)
            return TaskSample(number, prompt, tuple(task.separator + text for text in choices), choices, target)
        answers = tuple(self.answer.texts(found))
        if not answers or not all(answers):
            raise ValueError("has no answer, or an empty one.")
        if task.kind in GENERATED:
            return TaskSample(number, prompt, answers=answers)
        return TaskSample(number, prompt, (task.separator + answers[0],), answers=answers[:1])

    def example(self, found: Mapping[str, Any]) -> str:
        """A solved sample. Raises ValueError."""
        sample = self.sample(0, found, "")
        if self.task.kind == "choices":
            return sample.prompt + sample.continuations[sample.target]
        return sample.prompt + self.task.separator + sample.answers[0]

    def _choices(self, found: Mapping[str, Any]) -> tuple[str, ...]:
        choices = tuple(text for template in self.choices for text in template.texts(found))
        if len(choices) < 2 or not all(choices):
            raise ValueError(f"has {len(choices)} choices. Give at least 2, and none that is empty.")
        return choices

    def _target(self, found: Mapping[str, Any], choices: tuple[str, ...]) -> int:
        answer = self.answer.text(found).strip()
        match self.task.answer_is:
            case "index":
                place = int(answer) if answer.isdecimal() else -1
            case "letter":
                place = ord(answer.upper()) - ord("A") if len(answer) == 1 else -1
            case _:
                place = next((at for at, text in enumerate(choices) if text.strip() == answer), -1)
        if not 0 <= place < len(choices):
            allowed = {
                "index": f"must be from 0 to {len(choices) - 1}",
                "letter": f"must be from A to {chr(ord('A') + len(choices) - 1)}",
                "text": "must be one of the choices",
            }[self.task.answer_is]
            raise ValueError(f"has the answer {answer!r}, which {allowed} (answer_is: {self.task.answer_is}).")
        return place


def read_samples(task: TaskConfig, limit: int | None = None) -> list[TaskSample]:
    """The samples of a task, the first `limit` of them. Raises DataError with every faulty line among them, and
    PathError where a file cannot be read."""
    templates = TaskTemplates(task)
    examples, problems = list[str](), list[str]()
    if task.examples_data is not None and task.examples:
        path = Path(task.examples_data)
        for place, found in islice(_objects(path, task, problems), task.examples):
            try:
                examples.append(templates.example(found))
            except ValueError as error:
                problems.append(f"{place}: {error} (task {task.name})")
        if not problems and len(examples) < task.examples:
            problems.append(
                f"{path}: has {len(examples)} samples, and task {task.name} asks for examples = {task.examples}."
            )
    before = "".join([Template.of(task.description).text({}), *(text + task.examples_separator for text in examples)])
    samples = list[TaskSample]()
    for number, (place, found) in enumerate(islice(_objects(Path(task.data), task, problems), limit)):
        try:
            samples.append(templates.sample(number, found, before))
        except ValueError as error:
            problems.append(f"{place}: {error} (task {task.name})")
    if not samples and not problems:
        problems.append(f"{task.data}: has no samples (task {task.name}).")
    if problems:
        more = [f"... and {len(problems) - MOST_SHOWN:,} more"] if len(problems) > MOST_SHOWN else []
        raise DataError("\n".join([*problems[:MOST_SHOWN], *more]))
    return samples


def _objects(path: Path, task: TaskConfig, problems: list[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The objects of a file with their places; what else stands there is told in `problems`."""
    try:
        for number, line in enumerate(iter_lines(path, LONGEST_LINE), start=1):
            if not line.strip():
                continue
            try:
                found = parse_json(line)
            except ValueError as error:
                problems.append(f"{path}:{number}: is not JSON in UTF-8: {error} (task {task.name}).")
                continue
            if not isinstance(found, dict):
                problems.append(f"{path}:{number}: is not a JSON object (task {task.name}). Write one sample per line.")
                continue
            yield f"{path}:{number}", found
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
        raise PathError(f"{path}: {reason} (task {task.name}).") from None
