"""Tasks that the model in training is measured on, through the engine's own evaluation steps."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from llmtrain.config.tasks.schema import TaskConfig
from llmtrain.data.tasks.batches import Dealing, plan_steps, step_batches
from llmtrain.data.tasks.metrics import LogLikelihood, scored, task_metrics
from llmtrain.data.tasks.samples import TaskSample, read_samples
from llmtrain.data.tasks.tokens import ScoredText, TextEncoder
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.engines.base import Engine
from llmtrain.errors import DataError
from llmtrain.interop.text.special_tokens import named_tokens
from llmtrain.preflight.resolve import ResolvedRun
from llmtrain.train.start import Start, run_roles
from llmtrain.values.progress import TASK
from llmtrain.values.tokenizer import TokenRoles


@dataclass(frozen=True)
class EncodedTask:
    """A task, its samples, and the texts that are scored for each of them."""

    config: TaskConfig
    samples: Sequence[TaskSample]
    texts: Sequence[Sequence[ScoredText]]


@dataclass(frozen=True)
class TaskEvaluation:
    """Every `every_steps` steps (0: never) all samples of all tasks, whose texts are dealt out over the ranks."""

    tasks: Sequence[EncodedTask]
    every_steps: int
    dealing: Dealing

    def due(self, step: int) -> bool:
        return bool(self.tasks) and step % self.every_steps == 0

    def run(self, engine: Engine) -> dict[str, float]:
        """The metrics of all tasks, by `task/` and the names of task and metric. On all ranks alike."""
        texts = [text for task in self.tasks for texts in task.texts for text in texts]
        found = iter(text_scores(engine, texts, self.dealing))
        metrics = dict[str, float]()
        for task in self.tasks:
            outcomes = [
                scored(task.config, sample, [next(found) for _ in texts])
                for sample, texts in zip(task.samples, task.texts, strict=True)
            ]
            measured = task_metrics(task.config, outcomes)
            metrics |= {f"{TASK}{task.config.name}/{name}": value for name, value in measured.items()}
        return metrics


def text_scores(engine: Engine, texts: Sequence[ScoredText], dealing: Dealing) -> list[LogLikelihood]:
    """The log-likelihood of each text."""
    found = dict[int, LogLikelihood]()
    for step in plan_steps(texts, dealing):
        counts = engine.eval_step(step_batches(texts, step, dealing)).counts
        size = len(step.places)
        for place, loss, missed in zip(step.places, counts[:size], counts[size:], strict=True):
            found[place] = LogLikelihood(-loss, texts[place].num_scored, missed == 0)
    return [found[place] for place in range(len(texts))]


def build_tasks(resolved: ResolvedRun, start: Start, rank: int) -> TaskEvaluation:
    """The tasks of a run on one of its ranks, read and made into tokens as its documents were.

    Raises DataError for samples that are none, and where ranks have read different ones.
    """
    config, layout = resolved.config, resolved.layout
    dealing = Dealing.of(config, layout, layout.coordinates(rank).data)
    if not resolved.tasks:
        return TaskEvaluation((), 0, dealing)
    roles = run_roles(resolved, start.checkpoint.path if start.checkpoint else None)
    # Not what lies beside the file: beside the run's own copy nothing else does.
    tokenizer = load_tokenizer(resolved.tokenizer, roles or TokenRoles())
    named, limit = named_tokens(tokenizer, config.data.model_dump(mode="json")), dealing.limit - dealing.prompt_tokens
    encoded = list[EncodedTask]()
    for task in resolved.tasks:
        encoder = TextEncoder.of(tokenizer, named, config.model.family, task.max_length or limit)
        samples = read_samples(task)
        encoded.append(EncodedTask(task, samples, [encoder.texts(sample) for sample in samples]))
    evaluation = TaskEvaluation(encoded, config.evaluate.tasks_every_steps, dealing)
    _require_same(config.evaluate.tasks, repr(evaluation.tasks))
    return evaluation


def _require_same(files: Sequence[str], content: str) -> None:
    """Ranks that had other texts would wait for each other in vain."""
    if not dist.is_initialized():
        return
    digest = int.from_bytes(hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=7).digest())
    found = torch.tensor([digest, -digest])  # on the CPU: the groups have a backend for either device
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    if found.tolist() != [digest, -digest]:
        raise DataError(
            f"evaluate.tasks = {', '.join(files)}: ranks have read different tasks or samples. Put the same files "
            "where each of them reads, and leave them alone while a run starts."
        )
