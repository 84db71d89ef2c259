"""An evaluation of a trained model on tasks of our own."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llmtrain.config.rules.tasks import task_faults
from llmtrain.config.tasks.schema import GENERATED, TaskConfig
from llmtrain.data.storage.manifest import file_sha256
from llmtrain.data.tasks.metrics import Outcome, answered, scored, standard_errors, task_metrics
from llmtrain.data.tasks.samples import TaskSample, read_samples
from llmtrain.data.tasks.tokens import TextEncoder
from llmtrain.errors import ConfigError, DataError, InstallationError
from llmtrain.infer.answers import iter_texts
from llmtrain.infer.batching.sampling import Sampling
from llmtrain.infer.evaluation.samples_file import SamplesFile
from llmtrain.infer.prompt_file import Writing
from llmtrain.infer.text_model import PromptIds, TextModel

SAMPLES_AT_A_TIME = 128
"""Samples whose texts are sorted into batches together, and written together."""

GREEDY = Sampling(0)

OnProgress = Callable[[str, int, int], None]
"""Hears of a task's name, how many of its samples are done, and how many there are."""


@dataclass(frozen=True)
class TaskResult:
    """What an evaluation says of a task."""

    kind: str
    num_samples: int
    metrics: Mapping[str, float]
    errors: Mapping[str, float]
    """Standard errors of those that are means over samples."""


@dataclass(frozen=True)
class EvaluationOptions:
    """The first `limit` samples of each task (None: all), and a file for all of them, from which an evaluation that
    was stopped goes on."""

    on_progress: OnProgress
    limit: int | None = None
    out: Path | None = None


def require_harness() -> None:
    """Raise InstallationError where lm-eval is not there."""
    if find_spec("lm_eval") is None:
        raise InstallationError(
            "--tasks: what is no file is a task of lm-eval, which is not installed. Run pip install 'llmtrain[eval]', "
            "or give files of tasks (.yaml)."
        )


def evaluate_tasks(model: TextModel, tasks: Sequence[TaskConfig], options: EvaluationOptions) -> dict[str, TaskResult]:
    """The results by task.

    Raises ConfigError for tasks that the model cannot do, DataError for samples that are none.
    """
    require_able(model, tasks)
    read = _all_samples(tasks, options.limit)
    results = dict[str, TaskResult]()
    with SamplesFile(options.out, _digests(model, tasks)) as file:
        for task in tasks:
            outcomes = _outcomes(model, task, read[task.name], file, options.on_progress)
            results[task.name] = TaskResult(
                task.kind, len(outcomes), task_metrics(task, outcomes), standard_errors(outcomes)
            )
    return results


def _all_samples(tasks: Sequence[TaskConfig], limit: int | None) -> dict[str, list[TaskSample]]:
    """Those of each task, so that faults are told before any is measured. Raises DataError with those of all tasks."""
    read, faults = dict[str, list[TaskSample]](), list[str]()
    for task in tasks:
        try:
            read[task.name] = read_samples(task, limit)
        except DataError as error:
            faults.append(str(error))
    if faults:
        raise DataError("\n".join(faults))
    return read


def require_able(model: TextModel, tasks: Sequence[TaskConfig]) -> None:
    """Raise ConfigError where the model is none that tasks can be put to."""
    if not model.continues:
        raise ConfigError(
            "model.family = encoder: it fills masks, and neither writes on nor says how likely a text is. Evaluate a "
            "decoder or an encoder-decoder."
        )
    if faults := [*task_faults(tasks, model.config, model.model.prompt_tokens)]:
        raise ConfigError("\n".join(faults))


def text_encoder(model: TextModel, max_length: int | None = None) -> TextEncoder:
    """Texts as the model was trained on them."""
    limit = max_length or model.config.max_seq_len - model.model.prompt_tokens
    return TextEncoder.of(model.tokenizer, model.named, model.config.family, limit)


def _outcomes(
    model: TextModel, task: TaskConfig, samples: Sequence[TaskSample], file: SamplesFile, on_progress: OnProgress
) -> list[Outcome]:
    found = {sample.number: row for sample in samples if (row := file.found(task.name, sample.number))}
    missing = [sample for sample in samples if sample.number not in found]
    on_progress(task.name, len(found), len(samples))
    measure = _answer if task.kind in GENERATED else _score
    for start in range(0, len(missing), SAMPLES_AT_A_TIME):
        new = measure(model, task, missing[start : start + SAMPLES_AT_A_TIME])
        file.add(task.name, ((number, {"prompt": prompt, **outcome}) for number, prompt, outcome in new))
        found |= {number: dict(outcome) for number, _, outcome in new}
        on_progress(task.name, len(found), len(samples))
    return [found[sample.number] for sample in samples]


Measured = list[tuple[int, str, Outcome]]
"""The number of each sample, its prompt, and what was found."""


def _score(model: TextModel, task: TaskConfig, samples: Sequence[TaskSample]) -> Measured:
    encoder = text_encoder(model, task.max_length)
    texts = [encoder.texts(sample) for sample in samples]
    scores = iter(model.log_likelihoods([text for each in texts for text in each]))
    return [
        (sample.number, sample.prompt, scored(task, sample, [next(scores) for _ in each]))
        for sample, each in zip(samples, texts, strict=True)
    ]


def _answer(model: TextModel, task: TaskConfig, samples: Sequence[TaskSample]) -> Measured:
    encoder = text_encoder(model, task.max_length)
    prompts = [prompt_of(model, encoder, sample.prompt, task.max_tokens) for sample in samples]
    texts = iter_texts(model, prompts, Writing(GREEDY, task.max_tokens, task.stop))
    return [
        (sample.number, sample.prompt, answered(task, sample, text))
        for sample, text in zip(samples, texts, strict=True)
    ]


def prompt_of(model: TextModel, encoder: TextEncoder, text: str, max_tokens: int) -> PromptIds:
    """The end of a prompt, as much as leaves room for an answer; of an encoder-decoder what its encoder can read."""
    frame = encoder.source_frame
    before, behind = (encoder.bos_ids, ()) if frame is None else frame
    room = encoder.limit - len(before) - len(behind) - (max_tokens if frame is None else 0)
    ids = model.tokenizer.encode(text)
    if frame is None and not ids and not before:
        ids = [encoder.begin_id]
    return model.prompt([*before, *ids[-max(1, room) :], *behind])


def model_digest(model: TextModel) -> str:
    """Tells models apart, as far as samples follow from them."""
    return hashlib.sha256(f"{model.tokenizer.sha256} {model.trained.identity}".encode()).hexdigest()


def _digests(model: TextModel, tasks: Sequence[TaskConfig]) -> dict[str, str]:
    """By task what its samples are of: the model, the task's settings and its files."""
    digest, found = model_digest(model), dict[str, str]()
    for task in tasks:
        files = [file_sha256(Path(name)) for name in (task.data, task.examples_data) if name is not None]
        said: dict[str, Any] = task.model_dump(mode="json", exclude={"data", "examples_data"})
        found[task.name] = hashlib.sha256(json.dumps([digest, said, files], sort_keys=True).encode()).hexdigest()[:16]
    return found
