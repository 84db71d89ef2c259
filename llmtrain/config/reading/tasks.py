"""Reading files of evaluation tasks, with every problem at once. Pure."""

from collections.abc import Sequence
from pathlib import Path

from llmtrain.config.reading.load import LoadedConfig, Schema, load_file
from llmtrain.config.rules.tasks import task_problems
from llmtrain.config.tasks.schema import TaskConfig, TasksConfig
from llmtrain.errors import ConfigError


def load_tasks(files: Sequence[Path]) -> list[TaskConfig]:
    """The tasks of all files, whose names differ. Raises ConfigError with every problem of all files."""
    problems, found, places = list[str](), list[TaskConfig](), dict[str, str]()
    for file in files:
        try:
            loaded: LoadedConfig[TasksConfig] = load_file(file, (), Schema(TasksConfig, task_problems))
        except ConfigError as error:
            problems.append(str(error))
            continue
        for number, task in enumerate(loaded.config.tasks):
            where = loaded.locations.get(f"tasks.{number}.name", str(file))
            if task.name in places:
                problems.append(
                    f"tasks.{number}.name = {task.name} ({where}): is the name of a task at {places[task.name]} too. "
                    "Metrics need different names."
                )
            places.setdefault(task.name, where)
            found.append(task)
    if problems:
        raise ConfigError("\n".join(problems))
    return found
