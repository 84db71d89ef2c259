"""What of a pipeline's configuration rests on this machine: packages, inputs, lists, the tokenizer."""

from importlib.util import find_spec
from pathlib import Path

from data_pipelines.reading.formats import FORMATS
from data_pipelines.steps.table import package_problems
from llmtrain.config.pipeline import PipelineConfig
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.errors import LlmtrainError, Problem


def storage_problems(config: PipelineConfig) -> list[Problem]:
    """Everything that is missing, with what to do."""
    problems = package_problems(config.steps)
    if any(step.name == "near_dedup" for step in config.steps) and find_spec("rensa") is None:
        problems.append(Problem("steps", "near_dedup needs the package rensa: pip install 'llmtrain[data]'."))
    for number, source in enumerate(config.read):
        package = FORMATS[source.format].package if source.format != "auto" else None
        if package is not None and find_spec(package) is None:
            message = f"needs the package {package}: pip install 'llmtrain[data]'."
            problems.append(Problem(f"read.{number}.format", message, source.format))
    if config.tokenizer is not None and config.tokenizer.path is not None:
        try:
            load_tokenizer(Path(config.tokenizer.path))
        except LlmtrainError as error:
            problems.append(Problem("tokenizer.path", str(error), config.tokenizer.path))
    return problems
