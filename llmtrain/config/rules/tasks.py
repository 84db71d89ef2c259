"""Rules between the keys of a file of evaluation tasks. Pure."""

from collections.abc import Iterator, Sequence

from llmtrain.config.model import ModelConfig
from llmtrain.config.tasks.schema import GENERATED, TaskConfig, TasksConfig
from llmtrain.config.tasks.template import Field, Template
from llmtrain.errors import Problem

_USES: dict[str, tuple[str, ...]] = {
    "choices": ("choices",),
    "answer_is": ("choices",),
    "answer": ("choices", "cloze", *GENERATED),
    "separator": ("choices", "cloze", *GENERATED),
    "examples": ("choices", "cloze", *GENERATED),
    "max_tokens": GENERATED,
    "stop": GENERATED,
    "answer_after": GENERATED,
    "ignore_case": ("exact_match",),
    "ignore_punctuation": ("exact_match",),
}
"""Keys that not every kind reads."""

_NEEDED = {"choices": "choices: ['{endings}']", "answer": "answer: '{answer}'"}


def task_problems(config: TasksConfig) -> list[Problem]:
    """Everything that is wrong between keys."""
    if not config.tasks:
        return [Problem("tasks", "is required: a list of tasks, each with name, kind, data and prompt.")]
    problems, names = list[Problem](), dict[str, int]()
    for number, task in enumerate(config.tasks):
        key = f"tasks.{number}"
        if task.name in names:
            message = f"is the name of tasks.{names[task.name]} too. Metrics need different names."
            problems.append(Problem(f"{key}.name", message, task.name))
        names.setdefault(task.name, number)
        problems += [*_needs(task, key), *_unread(task, key), *_template_problems(task, key)]
    return problems


def task_faults(tasks: Sequence[TaskConfig], model: ModelConfig, prompt_tokens: int) -> Iterator[str]:
    """What a model cannot do of tasks; `prompt_tokens` of its positions are taken by a soft prompt."""
    if model.family == "encoder_decoder":
        names = [task.name for task in tasks if task.kind == "perplexity"]
        if names:
            yield (
                f"tasks {', '.join(names)}: kind = perplexity has no prompt that an encoder could read, and the model "
                "is an encoder-decoder. Try cloze, with a prompt and an answer."
            )
    longest = model.max_seq_len - prompt_tokens
    for task in tasks:
        room = task.max_length or longest
        if room > longest:
            yield (
                f"task {task.name}: max_length = {task.max_length} is more than the {longest} positions of the model."
            )
        if task.kind in GENERATED and task.max_tokens >= room:
            yield (
                f"task {task.name}: max_tokens = {task.max_tokens} leaves no room for a prompt in the {room} positions "
                f"of a text. Try {max(1, room // 2)}."
            )


def _needs(task: TaskConfig, key: str) -> Iterator[Problem]:
    if not task.data:
        yield Problem(f"{key}.data", "is required: a file of JSON lines, one object per sample.")
    if not task.prompt and task.kind == "perplexity":
        yield Problem(f"{key}.prompt", "is required: the text, such as prompt: '{text}'.")
    for name, example in _NEEDED.items():
        if task.kind in _USES[name] and not getattr(task, name):
            yield Problem(f"{key}.{name}", f"is required with kind = {task.kind}, such as {example}.")
    if task.examples and task.examples_data is None:
        yield Problem(f"{key}.examples_data", f"is required with examples = {task.examples}: a file of JSON lines.")
    if task.examples_data is not None and not task.examples:
        message = "has no effect with examples = 0. Try examples: 5, or leave it out."
        yield Problem(f"{key}.examples_data", message, task.examples_data, uses=(f"{key}.examples",))


def _unread(task: TaskConfig, key: str) -> Iterator[Problem]:
    for name in sorted(task.model_fields_set & _USES.keys()):
        if task.kind not in _USES[name]:
            kinds = ", ".join(_USES[name])
            message = f"has no effect with kind = {task.kind}. Leave it out; it goes with {kinds}."
            yield Problem(f"{key}.{name}", message, getattr(task, name), uses=(f"{key}.kind",))


def _template_problems(task: TaskConfig, key: str) -> Iterator[Problem]:
    texts = [("prompt", task.prompt), ("answer", task.answer), ("description", task.description)]
    texts += [(f"choices.{number}", text) for number, text in enumerate(task.choices)]
    for name, text in texts:
        try:
            template = Template.of(text)
        except ValueError as error:
            yield Problem(f"{key}.{name}", f"{error}.", repr(text))
            continue
        if name == "description" and any(isinstance(part, Field) for part in template.parts):
            yield Problem(
                f"{key}.{name}", "has a field, and stands before all samples. Write {{ for a brace.", repr(text)
            )
