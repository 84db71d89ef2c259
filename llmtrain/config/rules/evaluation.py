"""Rules about evaluation, the best checkpoint and early stopping. Pure."""

from collections.abc import Iterator

from llmtrain.config.metrics import METRIC_TABLE
from llmtrain.config.reading.suggestions import either, nearest_multiples
from llmtrain.config.schema import RunConfig
from llmtrain.errors import Problem

Found = Iterator[Problem]


def evaluation_needs_data(config: RunConfig) -> Found:
    every = config.evaluate.every_steps
    if every > 0 and not config.data.valid:
        message = "needs data.valid, which is empty. Try 0, or data.valid=[{path: data/shards/valid}]."
        yield Problem("evaluate.every_steps", message, every, uses=("data.valid",))


def best_needs_evaluation(config: RunConfig) -> Found:
    if config.checkpoint.keep_best and config.evaluate.every_steps == 0:
        message = "needs evaluations, and evaluate.every_steps = 0. Try false, or evaluate.every_steps=50."
        yield Problem("checkpoint.keep_best", message, "true", uses=("evaluate.every_steps",))


def early_stop_needs_evaluation(config: RunConfig) -> Found:
    stop_after = config.evaluate.stop_after
    if stop_after is not None and config.evaluate.every_steps == 0:
        message = "counts evaluations, and evaluate.every_steps = 0. Try null, or evaluate.every_steps=50"
        message += "." if config.data.valid else " and data.valid=[{path: data/shards/valid}]."
        uses = ("evaluate.every_steps", "data.valid")
        yield Problem("evaluate.stop_after", message, stop_after, uses=uses)


def early_stop_keeps_the_best(config: RunConfig) -> Found:
    """The run's newest weights are some evaluations past the best ones, which are what it was stopped for."""
    evaluate, checkpoint = config.evaluate, config.checkpoint
    if evaluate.stop_after is None or evaluate.every_steps == 0:
        return
    if not checkpoint.keep_best:
        message = (
            f"evaluate.stop_after = {evaluate.stop_after} ends the run that many evaluations after its best one, whose "
            "checkpoint must be kept. Try true."
        )
        yield Problem("checkpoint.keep_best", message, "false", uses=("evaluate.stop_after",))
    if checkpoint.every_steps == 0 or evaluate.every_steps % checkpoint.every_steps:
        message = (
            f"must divide evaluate.every_steps = {evaluate.every_steps}, as any evaluation may be the best of a run "
            f"with evaluate.stop_after = {evaluate.stop_after}. Try {evaluate.every_steps}."
        )
        uses = ("evaluate.every_steps", "evaluate.stop_after")
        yield Problem("checkpoint.every_steps", message, checkpoint.every_steps, uses=uses)


def improvement_has_a_use(config: RunConfig) -> Found:
    evaluate = config.evaluate
    if evaluate.min_improvement and evaluate.stop_after is None:
        message = "has no effect without evaluate.stop_after. Try 0, or evaluate.stop_after=5."
        yield Problem("evaluate.min_improvement", message, evaluate.min_improvement, uses=("evaluate.stop_after",))


def tasks_have_steps(config: RunConfig) -> Found:
    evaluate = config.evaluate
    if evaluate.tasks and not evaluate.tasks_every_steps:
        message = f"is needed for evaluate.tasks = {_files(config)}. Try 500, or evaluate.tasks=[]."
        yield Problem("evaluate.tasks_every_steps", message, 0, uses=("evaluate.tasks",))
    if evaluate.tasks_every_steps and not evaluate.tasks:
        message = "needs evaluate.tasks, which is empty. Try 0, or evaluate.tasks=[tasks.yaml]."
        yield Problem("evaluate.tasks_every_steps", message, evaluate.tasks_every_steps, uses=("evaluate.tasks",))


def tasks_suit_the_model(config: RunConfig) -> Found:
    """Texts are scored by what stands before each token, whatever else is in their batch."""
    model = config.model
    if not config.evaluate.tasks:
        return
    if model.predicts_labels or model.family == "encoder":
        key, value = ("model.head", model.head) if model.predicts_labels else ("model.family", model.family)
        message = f"are put to models that say how likely the next token is, and {key} = {value}. Try []."
        yield Problem("evaluate.tasks", message, _files(config), uses=(key,))
    elif model.moe is not None and model.moe.router == "expert_choice":
        message = (
            "do not go with model.moe.router = expert_choice in training: experts choose among all tokens of a batch, "
            "so texts would change each other's scores. Try [], and `llmtrain eval` on checkpoints."
        )
        yield Problem("evaluate.tasks", message, _files(config), uses=("model.moe.router",))


def tasks_fit_the_parts(config: RunConfig) -> Found:
    """Texts are padded to what ranks can cut, and an encoder has no positions beyond the model's."""
    model, parallel = config.model, config.parallel
    parts = parallel.context * (parallel.tensor if parallel.sequence else 1)
    if config.evaluate.tasks and model.family == "encoder_decoder" and model.max_seq_len % parts:
        tries = either(nearest_multiples(parts, model.max_seq_len))
        message = f"must be a multiple of the {parts} parts of a sequence with evaluate.tasks. Try {tries}."
        uses = ("evaluate.tasks", "model.family", "parallel.context", "parallel.tensor", "parallel.sequence")
        yield Problem("model.max_seq_len", message, model.max_seq_len, uses=uses)


def _files(config: RunConfig) -> str:
    return f"[{', '.join(config.evaluate.tasks)}]"


def metric_is_measured(config: RunConfig) -> Found:
    metric, head = config.evaluate.metric, config.model.head
    heads = METRIC_TABLE[metric].heads
    if heads and head not in heads:
        known = [name for name, row in METRIC_TABLE.items() if not row.heads or head in row.heads]
        message = f"is measured where model.head is {either(heads)}, and it is {head}. Try {either(known)}."
        yield Problem("evaluate.metric", message, metric, uses=("model.head",))
    elif metric != "loss" and not config.checkpoint.keep_best and config.evaluate.stop_after is None:
        message = "has no effect without checkpoint.keep_best. Try loss, or checkpoint.keep_best=true."
        yield Problem("evaluate.metric", message, metric, uses=("checkpoint.keep_best",))


EVALUATION_RULES = (
    evaluation_needs_data,
    best_needs_evaluation,
    early_stop_needs_evaluation,
    early_stop_keeps_the_best,
    improvement_has_a_use,
    tasks_have_steps,
    tasks_suit_the_model,
    tasks_fit_the_parts,
    metric_is_measured,
)
