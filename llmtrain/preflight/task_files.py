"""The tasks that a model in training is measured on: their files are read, and what is wrong there is told.

Imports no torch.
"""

from collections.abc import Iterator
from pathlib import Path

from llmtrain.config.reading.tasks import load_tasks
from llmtrain.config.rules.tasks import task_faults
from llmtrain.config.schema import RunConfig
from llmtrain.config.tasks.schema import GENERATED, TaskConfig
from llmtrain.data.storage.folders import run_settings, run_tokenizer
from llmtrain.data.storage.manifest import Manifest
from llmtrain.data.tasks.samples import read_samples
from llmtrain.errors import ConfigError, DataError, PathError, Problem

KEY = "evaluate.tasks"


def run_tasks(config: RunConfig) -> tuple[TaskConfig, ...]:
    """The tasks of a run. Raises ConfigError with every fault of their files."""
    return tuple(load_tasks([Path(file) for file in config.evaluate.tasks]))


def task_problems(config: RunConfig, manifest: Manifest | None) -> Iterator[Problem]:
    """What is wrong with a run's tasks, samples included. `manifest` is that of the first training source."""
    if not config.evaluate.tasks:
        return
    try:
        tasks = run_tasks(config)
    except ConfigError as error:
        yield Problem(KEY, str(error))
        return
    for fault in (*_written(tasks), *task_faults(tasks, config.model, config.prompt_tokens)):
        yield Problem(KEY, fault, uses=("model.max_seq_len", "finetune.prompt.tokens"))
    for task in tasks:
        try:
            read_samples(task)
        except (DataError, PathError) as error:
            yield Problem(KEY, str(error))
    if manifest is not None:
        yield from _tokenizer_problems(config, manifest)


def _written(tasks: tuple[TaskConfig, ...]) -> Iterator[str]:
    for task in tasks:
        if task.kind in GENERATED:
            yield (
                f"task {task.name}: kind = {task.kind} has the model write answers token by token, and a step of "
                "training scores whole texts. Leave it out, and put it to checkpoints with `llmtrain eval`."
            )


def _tokenizer_problems(config: RunConfig, manifest: Manifest) -> Iterator[Problem]:
    from llmtrain.data.tokenizer import load_tokenizer  # its libraries are slow to import

    try:
        load_tokenizer(run_tokenizer(config.data, manifest), run_settings(config.data, manifest))
    except (ConfigError, DataError) as error:
        yield Problem("data.tokenizer", f"evaluate.tasks needs it: {error}", config.data.tokenizer, uses=(KEY,))
