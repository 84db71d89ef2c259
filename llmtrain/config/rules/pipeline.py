"""Rules between the keys of a data pipeline. Pure."""

from urllib.parse import urlsplit

from llmtrain.config.pipelines.schema import ExecutorConfig, PipelineConfig, ReadConfig
from llmtrain.config.reading.credentials import text_without_credentials
from llmtrain.config.reading.suggestions import either, nearest_multiples
from llmtrain.config.rules.launch import HEAD, NO_HEAD
from llmtrain.config.rules.steps import step_problems
from llmtrain.errors import Problem

KEYED_FORMATS = ("auto", "jsonl", "json", "parquet", "arrow", "webdataset", "warc")
"""Formats whose documents have more than a text."""


def pipeline_problems(config: PipelineConfig) -> list[Problem]:
    """Everything that is wrong between keys."""
    return [
        *_read_problems(config.read),
        *step_problems(config.steps),
        *_tokenizer_problems(config),
        *_executor_problems(config.run),
    ]


def _read_problems(sources: tuple[ReadConfig, ...]) -> list[Problem]:
    problems: list[Problem] = []
    names: dict[str, int] = {}
    for number, source in enumerate(sources):
        name, key = source.name or source.path, f"read.{number}"
        if name in names:
            message = f"is the name of read.{names[name]} too. Counts need different names."
            problems.append(Problem(f"{key}.{'name' if source.name else 'path'}", message, name))
        names.setdefault(name, number)
        if _has_credentials(source.path):
            message = (
                "its user, password or query would stand in plan.json, in counts and in names of documents. Give the "
                "account to the file system, as its library says, or fetch the files first."
            )
            problems.append(Problem(f"{key}.path", message, text_without_credentials(source.path)))
        if source.separator is not None and source.format not in ("auto", "text"):
            message = f"cuts plain text, and {key}.format is {source.format}. Leave it out."
            problems.append(Problem(f"{key}.separator", message, source.separator, uses=(f"{key}.format",)))
        for field in ("id", "url"):
            value = getattr(source, field)
            if value is not None and source.format not in KEYED_FORMATS:
                message = f"names a key, and documents of the format {source.format} have none. Leave it out."
                problems.append(Problem(f"{key}.{field}", message, value, uses=(f"{key}.format",)))
    return problems


def _has_credentials(path: str) -> bool:
    """True for a URL with a user, or with a query, which in s3, gs and hf is part of a pattern."""
    try:
        parts = urlsplit(path)
    except ValueError:  # no URL at all: whoever looks for it says so
        return False
    return "@" in parts.netloc or (parts.scheme.lower() in ("http", "https") and bool(parts.query))


def _tokenizer_problems(config: PipelineConfig) -> list[Problem]:
    tokenizer = config.tokenizer
    if tokenizer is None or (tokenizer.path is None) != (tokenizer.train is None):
        return []
    if tokenizer.path is None:
        return [Problem("tokenizer", "must name a file (tokenizer: FILE), or have the section train.")]
    message = "is one tokenizer, and tokenizer.train another. Leave one of them out."
    return [Problem("tokenizer.path", message, tokenizer.path, uses=("tokenizer.train",))]


def _executor_problems(run: ExecutorConfig) -> list[Problem]:
    if run.backend == "ray":
        wrong = run.address not in (None, "auto", "local") and not HEAD.fullmatch(run.address or "")
        return [Problem("run.address", NO_HEAD, run.address, uses=("run.backend",))] if wrong else []
    fix = f"is for Ray, and run.backend is {run.backend}. Set run.backend=ray, or leave it out."
    keys = {"address": run.address, "allow_open_cluster": "true" if run.allow_open_cluster else None}
    found = [
        Problem(f"run.{key}", fix, value, uses=("run.backend",)) for key, value in keys.items() if value is not None
    ]
    if run.slurm.nodes > 1:
        message = "must be 1: processes work on one machine. Try 1, or run.backend=ray, whose tasks work on all."
        found.append(Problem("run.slurm.nodes", message, run.slurm.nodes, uses=("run.backend",)))
    return found


def slurm_job_problems(run: ExecutorConfig) -> list[Problem]:
    """What is wrong with a job of Slurm that does the work: its limits, which matter nowhere else."""
    found: list[Problem] = []
    slurm, grace = run.slurm, run.grace_seconds
    if grace == 0 or grace >= slurm.warn_seconds:
        message = (
            f"must be less than run.slurm.warn_seconds = {slurm.warn_seconds}, and not 0: a job that has not stopped "
            "when its time is up is not requeued."
        )
        tries = f" Try {slurm.warn_seconds // 2}, or a larger run.slurm.warn_seconds." if slurm.warn_seconds > 1 else ""
        uses = ("run.slurm.warn_seconds",)
        found.append(Problem("run.grace_seconds", message + tries, f"{grace:g}", uses=uses))
    if run.workers % slurm.nodes:
        message = (
            f"must be 0 (whole machines), or a multiple of run.slurm.nodes = {slurm.nodes}, over which the tasks are "
            f"spread evenly. Try {either(nearest_multiples(slurm.nodes, run.workers))}."
        )
        found.append(Problem("run.workers", message, run.workers, uses=("run.slurm.nodes",)))
    return found
