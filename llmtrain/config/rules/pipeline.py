"""Rules between the keys of a data pipeline. Pure."""

from llmtrain.config.pipeline import PipelineConfig, ReadConfig
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
        *_executor_problems(config),
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
        if source.separator is not None and source.format not in ("auto", "text"):
            message = f"cuts plain text, and {key}.format is {source.format}. Leave it out."
            problems.append(Problem(f"{key}.separator", message, source.separator, uses=(f"{key}.format",)))
        for field in ("id", "url"):
            value = getattr(source, field)
            if value is not None and source.format not in KEYED_FORMATS:
                message = f"names a key, and documents of the format {source.format} have none. Leave it out."
                problems.append(Problem(f"{key}.{field}", message, value, uses=(f"{key}.format",)))
    return problems


def _tokenizer_problems(config: PipelineConfig) -> list[Problem]:
    tokenizer = config.tokenizer
    if tokenizer is None or (tokenizer.path is None) != (tokenizer.train is None):
        return []
    if tokenizer.path is None:
        return [Problem("tokenizer", "must name a file (tokenizer: FILE), or have the section train.")]
    message = "is one tokenizer, and tokenizer.train another. Leave one of them out."
    return [Problem("tokenizer.path", message, tokenizer.path, uses=("tokenizer.train",))]


def _executor_problems(config: PipelineConfig) -> list[Problem]:
    run = config.run
    if run.backend == "ray":
        return []
    return [
        Problem(
            f"run.{key}", f"is for Ray, and run.backend is {run.backend}. Set run.backend=ray, or leave it out.", value
        )
        for key, value in (("address", run.address), ("allow_open_cluster", run.allow_open_cluster or None))
        if value is not None
    ]
