"""The teacher of a distillation as its small files tell: its architecture, and whether its tokens are the run's.

Imports no torch.
"""

from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from llmtrain.checkpoint.folders import CONFIG
from llmtrain.checkpoint.origin import Origin, newest_origin
from llmtrain.config.model import ModelConfig
from llmtrain.config.rules.distill import teachers_fit
from llmtrain.config.schema import RunConfig
from llmtrain.data.storage.manifest import Manifest
from llmtrain.errors import CheckpointError, Problem
from llmtrain.preflight.beginning import checkpoints_of
from llmtrain.preflight.differences import SHOWN_DIGITS, has_tokenizer, saved_tokenizer

KEY = "distill.teacher"


def teacher_origin(config: RunConfig) -> Origin | None:
    """The origin of the teacher's newest checkpoint; None where the run has no teacher, or none is there."""
    return None if config.distill is None else newest_origin(checkpoints_of(Path(config.distill.teacher)))


def fill_teacher(config: RunConfig, manifest: Manifest) -> RunConfig | list[Problem]:
    """The configuration with distill.model filled in, which needs model.vocab_size, or what is wrong with the teacher.

    `manifest` is that of the first training source. Raises CheckpointError where the teacher's configuration is none.
    """
    origin = teacher_origin(config)
    if config.distill is None or origin is None:
        return config  # where it is not there, `resume_problems` says so
    problems = list(_wrong_kind(config, origin)) + list(_other_tokens(config, origin, manifest))
    try:
        model = ModelConfig.model_validate(origin.section("model"))
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]
        key = ".".join(("model", *map(str, reason["loc"])))
        raise CheckpointError(f"{origin.path / CONFIG}: {key}: {reason['msg']}.") from error
    if config.distill.model not in (None, model):
        message = f"is not the architecture that {origin.path} has. Remove it: it is taken from there."
        problems.append(Problem("distill.model", message, uses=(KEY,)))
    filled = config.with_keys({"distill.model": model})
    return problems or list(teachers_fit(filled)) or filled


def _wrong_kind(config: RunConfig, origin: Origin) -> Iterator[Problem]:
    assert config.distill is not None
    finetune = origin.section("finetune")
    if finetune.get("method", "full") != "full":
        message = f"has a {finetune['method']} beside its weights. Merge it: `llmtrain export {config.distill.teacher} "
        yield Problem(KEY, f"{message}OUT --to hf`, import OUT, and name the import.", config.distill.teacher)


def _other_tokens(config: RunConfig, origin: Origin, manifest: Manifest) -> Iterator[Problem]:
    """A teacher predicts ids: they mean the same only where the tokenizer is the same."""
    assert config.distill is not None
    was, now, place = saved_tokenizer(origin), manifest.tokenizer_sha256, config.distill.teacher
    if was is None:
        message = (
            f"{origin.path} has no tokenizer beside it, so that nobody can tell whether its tokens are this run's. "
        )
        message += "Import it with its tokenizer, or name another one."
        yield Problem(KEY, message, place)
    elif not has_tokenizer(origin, now):
        message = (
            f"{origin.path} was trained with a tokenizer of sha256 {was[:SHOWN_DIGITS]}, and that of data.train has "
        )
        message += f"{now[:SHOWN_DIGITS]}: its predictions mean other tokens. Name a teacher with the same tokenizer."
        yield Problem(KEY, message, place, uses=("data.train",))
