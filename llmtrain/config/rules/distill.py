"""Rules about `distill`: the teacher can predict what the student learns, and can be split as it is. Pure."""

from collections.abc import Iterator
from typing import Any

from llmtrain.config.rules.model import MODEL_RULES
from llmtrain.config.rules.parallel import PARALLEL_RULES
from llmtrain.config.schema import RunConfig
from llmtrain.errors import Problem

Found = Iterator[Problem]


def teacher_run(config: RunConfig) -> RunConfig:
    """The run as it would be with the teacher as its model, which is not trained: by it the teacher is built, and its
    layout checked. A virtual pipeline and its split are the student's alone."""
    assert config.distill is not None and config.distill.model is not None
    student: dict[str, Any] = {
        "finetune": None,
        "distill": None,
        "quantize": None,
        "optim.freeze": ["*"],
        "optim.lr_scale": [],
        "train.recompute": "none",
    }
    parallel: dict[str, Any] = {"virtual_pipeline": 1, "pipeline_split": None, "pipeline_schedule": None}
    if config.parallel.context > 1:
        parallel["context_exchange"] = config.context_exchange  # the teacher's own choice would be by its own heads
    if config.distill.model.moe is None:
        parallel["expert"] = 1
    keys = {**student, **{f"parallel.{name}": value for name, value in parallel.items()}}
    return config.with_keys({**keys, "model": config.distill.model})


def students_predict_tokens(config: RunConfig) -> Found:
    if config.distill is None:
        return
    if config.model.predicts_labels:
        message = "predicts labels, and distill learns a teacher's predictions of tokens. Remove the section distill, "
        yield Problem("model.head", f"{message}or choose another head.", config.model.head, uses=("distill",))
    if config.method == "prompt":
        message = "stands before each sample, where the teacher has nothing. Try lora, or remove the section distill."
        yield Problem("finetune.method", message, "prompt", uses=("distill",))


def top_k_is_of_the_vocabulary(config: RunConfig) -> Found:
    if config.distill is None or config.model.vocab_size is None:
        return
    top_k, size = config.distill.top_k, config.model.vocab_size
    if top_k > size:
        message = f"must be at most model.vocab_size = {size}, which is all of the teacher's prediction. Try {size}."
        yield Problem("distill.top_k", message, top_k, uses=("model.vocab_size",))


def teachers_fit(config: RunConfig) -> Found:
    """Nothing is told where the teacher's architecture is not known yet."""
    if config.distill is None or config.distill.model is None:
        return
    teacher, student, place = config.distill.model, config.model, config.distill.teacher
    key, uses = "distill.teacher", ("distill.model",)
    if teacher.family != student.family or teacher.predicts_labels:
        what = f"head = {teacher.head}" if teacher.predicts_labels else f"family = {teacher.family}"
        message = f"has model.{what}, and reads and predicts other things than model.family = {student.family}. "
        yield Problem(key, f"{message}Name a teacher of that family with a head for tokens.", place, uses=uses)
        return
    sizes = (teacher.vocab_size, student.vocab_size)
    if None not in sizes and len(set(sizes)) > 1:
        message = f"has {sizes[0]} tokens, and this run's model has {sizes[1]}: they must be the "
        yield Problem(
            key, f"{message}same ones. Name a teacher that was trained with this tokenizer.", place, uses=uses
        )
    longest = max(config.lengths.main, config.lengths.encoder)
    if longest > teacher.max_seq_len:
        message = f"has model.max_seq_len = {teacher.max_seq_len}, and samples have up to {longest} positions. Lower "
        yield Problem("data.seq_len", f"{message}data.seq_len.", config.data.seq_len, uses=(key,))
    run = teacher_run(config)
    if run.balances_context != config.balances_context:
        message = (
            f"has model.attention.kind = {teacher.attention.kind}, so that its context ranks hold other positions "
        )
        message += f"than those of model.attention.kind = {student.attention.kind}. Set parallel.context=1, or name "
        yield Problem(key, f"{message}a teacher with the same kind.", place, uses=("parallel.context",))
    for rule in (*MODEL_RULES, *PARALLEL_RULES):
        for problem in rule(run):
            message = f"cannot be split as the model is: {problem.key} {problem.message}"
            yield Problem(key, message, place, uses=(problem.key, *problem.uses))


DISTILL_RULES = (students_predict_tokens, top_k_is_of_the_vocabulary, teachers_fit)
