"""The differences that a run may have from the checkpoint that it continues, and the refusal of all others.

What a run computes follows from its model, its seed, its tokenizer and its stream of samples. Where one of them has
changed, the run would be neither the old one nor a new one. Layout, engine, batch size, schedule and everything that
only records or supervises may change at any time. Imports no torch.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from llmtrain.checkpoint.folders import folder_of_checkpoints, is_checkpoint, nearest_checkpoint
from llmtrain.config.reading.rendering import shown
from llmtrain.config.schema import RunConfig
from llmtrain.data.storage.manifest import Manifest
from llmtrain.errors import Problem
from llmtrain.preflight.beginning import begins_at_base, is_elsewhere, run_origin
from llmtrain.preflight.differences import Difference, differences
from llmtrain.words import looked_from


def refusals(found: Iterable[Difference], config: RunConfig) -> list[Problem]:
    """Of the differences those that checkpoint.allow_change does not allow, as the user is told."""
    allowed = config.checkpoint.allow_change
    refused = [item for item in found if item.fixed or not is_allowed(item.key, allowed)]
    return [_problem(item, config) for item in refused]


def is_allowed(key: str, allowed: Sequence[str]) -> bool:
    """True where a key, or a section around it, is named."""
    return any(key == name or key.startswith(f"{name}.") for name in allowed)


def one_line(found: Sequence[Difference]) -> str:
    """`seed 1 -> 2, optim.lr 0.1 -> 0.2`."""
    return ", ".join(f"{item.key} {shown(item.key, item.was)} -> {shown(item.key, item.now)}" for item in found)


def _problem(item: Difference, config: RunConfig) -> Problem:
    advice = item.advice
    if not item.fixed:
        other = "take another checkpoint" if is_elsewhere(config) else "choose another name"
        allow = ", ".join([*config.checkpoint.allow_change, item.key])
        advice = f"Set it back, {other}, or allow it with checkpoint.allow_change=[{allow}]."
    return Problem(item.key, f"{item.text}. {advice}", None if item.value is None else shown(item.key, item.value))


def no_base(config: RunConfig) -> Problem:
    """The refusal of a run whose frozen parameters have no weights that they could be loaded from."""
    what = "an import, a run or a checkpoint"
    if config.method != "full":
        message = f"trains what it adds to a model, and none is named. Set finetune.base to {what}."
        return Problem("finetune.method", message, config.method, uses=("finetune.base", "checkpoint.resume"))
    message = f"has no weights to keep: the run begins from nothing. Set finetune.base to {what}, or optim.freeze=[]."
    return Problem("optim.freeze", message, ", ".join(config.optim.freeze), uses=("checkpoint.resume",))


def resume_problems(config: RunConfig) -> Iterator[Problem]:
    """`checkpoint.resume` names something that can be continued, `finetune.base` something to begin from."""
    resume = config.checkpoint.resume
    if resume not in ("auto", "none"):
        yield from _path_problems("checkpoint.resume", resume, "Write auto, none, or")
    # A run that has checkpoints of its own knows its base by them.
    if config.finetune is not None and config.finetune.base is not None and begins_at_base(config):
        yield from _path_problems("finetune.base", config.finetune.base, "Write")
    if config.distill is not None:
        yield from _path_problems("distill.teacher", config.distill.teacher, "Write")


def _path_problems(key: str, value: str, words: str) -> Iterator[Problem]:
    path = Path(value)
    if is_checkpoint(path) or folder_of_checkpoints(path):
        return
    if (path / "config.json").is_file():
        yield Problem(key, f"is a Hugging Face folder. Run `llmtrain import {path} OUT`, and name OUT here.", value)
        return
    missing = f"no such checkpoint. {looked_from(path)}".rstrip()
    fault = "is neither a checkpoint nor a run with one." if path.exists() else missing
    near = nearest_checkpoint(path)
    advice = f"Try {near}." if near else f"{words} the path of a checkpoint or of a run."
    yield Problem(key, f"{fault} {advice}", value)


def difference_problems(config: RunConfig, manifests: dict[str, Manifest]) -> list[Problem]:
    """The refused differences from the checkpoint that the run would continue, which may yet turn out to be damaged."""
    origin = run_origin(config)
    if origin is None:
        return [no_base(config)] if config.frozen else []
    keys = [f"data.train.{number}.path" for number in range(len(config.data.train))]
    training = [manifests[key] for key in keys if key in manifests]
    return refusals(differences(origin, config, training if len(training) == len(keys) else None), config)
