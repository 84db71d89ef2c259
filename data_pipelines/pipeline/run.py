"""A pipeline from its plan to its result: stage by stage, what is done already is not done again."""

import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from data_pipelines.pipeline.executors import Executor
from data_pipelines.pipeline.planning import make_plan
from data_pipelines.pipeline.program import PipelineStage
from data_pipelines.pipeline.progress import Advance, Progress
from data_pipelines.pipeline.publishing import is_published, notes_of, publish
from data_pipelines.pipeline.tasks import TaskFailure, WorkspaceKey, perform
from data_pipelines.pipeline.work import DONE_FOLDER, WORK_FOLDER, DamagedWorkError, DataTask, Workspace
from llmtrain.config.pipelines.schema import PipelineConfig
from llmtrain.config.reading.rendering import plain_yaml, without_secrets
from llmtrain.errors import DataError, LlmtrainError
from llmtrain.files import replace_file
from llmtrain.runs.folder import RunFolder

CONFIG_NAME = "pipeline.yaml"

MOST_REPAIRS = 3
"""Times that a task's files are written again because they are not what was written."""


def run_pipeline(config: PipelineConfig, executor: Executor, progress: Progress) -> Path:
    """Do what is left of a pipeline, and return its folder. The same call continues where it was ended.

    Raises RunFolderInUseError, ConfigError where the folder was begun as another pipeline, DataError for damage.
    """
    folder = Path(config.output_dir) / config.name
    with RunFolder(folder):
        (folder / DONE_FOLDER).mkdir(exist_ok=True)
        plan = make_plan(config, folder, executor, progress.planned)
        work = Workspace(folder, config, plan)
        if is_published(work):
            progress.say(f"{folder}: this pipeline has finished; there is nothing left to do.")
            return folder
        values = config.model_dump(mode="json")
        replace_file(folder / CONFIG_NAME, without_secrets(plain_yaml(values), values).encode())
        stages = _Stages(work, executor, progress)
        while not stages.published():
            pass
        if not config.run.keep_work:
            shutil.rmtree(folder / WORK_FOLDER, ignore_errors=True)
    return folder


_SHORT = ("count", "order")
"""Kinds of stages of which nothing is said: they add up what others have counted."""


@dataclass
class _Stages:
    """Runs the tasks of stages. `repairs` counts how often what a task wrote was found damaged."""

    work: Workspace
    executor: Executor
    progress: Progress
    repairs: Counter[DataTask] = field(default_factory=Counter)

    def published(self) -> bool:
        """Do everything that is not done; False where a file was found damaged at the end, and has to be made anew."""
        try:
            for stage in self.work.program.stages:
                self._finish(stage)
            publish(self.work)
        except DamagedWorkError as error:
            self._forget(error.task, str(error))
            return False
        for note in notes_of(self.work):
            self.progress.say(f"note: {note}")
        return True

    def _forget(self, task: DataTask, message: str) -> None:
        """Have what a task wrote written again. Raises DataError where that was so too often."""
        self.repairs[task] += 1
        if self.repairs[task] > MOST_REPAIRS:
            raise DataError(
                f"{message}. It was written {MOST_REPAIRS + 1} times. Check the disk, or name another output_dir."
            )
        self.progress.say(f"{message}: written again")
        self.work.forget(task)

    def _finish(self, stage: PipelineStage) -> None:
        """Do the tasks of a stage that are not done."""
        tasks = [DataTask(stage.name, number) for number in range(self.work.num_tasks(stage))]
        todo = [task for task in tasks if not self.work.is_done(task)]
        self._clear_partial(stage)
        if stage.kind in _SHORT:
            self._run(todo, lambda counters: None)
            return
        with self.progress.stage(self.work.program.title(stage), len(tasks), len(tasks) - len(todo)) as advance:
            self._run(todo, advance)

    def _clear_partial(self, stage: PipelineStage) -> None:
        """Remove what killed tasks had begun to write: its names end with the number of a process."""
        with suppress(FileNotFoundError):
            for path in (self.work.folder / WORK_FOLDER / stage.name).iterdir():
                if path.name.startswith("."):
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def _run(self, todo: Sequence[DataTask], advance: Advance) -> None:
        """Do tasks, and again those that have found a file damaged, once that is written anew."""
        while todo:
            left: list[DataTask] = []
            damaged: dict[DataTask, str] = {}
            for task, result in self.executor.each(partial(perform, WorkspaceKey.of(self.work)), todo):
                if not isinstance(result, TaskFailure):
                    advance(result.counters)
                elif result.damaged is not None:
                    left.append(task)
                    damaged[result.damaged] = result.message
                else:
                    error = LlmtrainError(result.message)
                    error.exit_code = result.exit_code
                    raise error
            for task, message in damaged.items():
                self._forget(task, message)
            self._run(list(damaged), lambda counters: None)
            todo = left
