"""A model with less in it: parts left out or weights zero, written as a folder that runs begin from, as from an import.

What is left is measured before it is written. The folder gets its name when it was read again and compared with the
model that it was made of.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llmtrain.checkpoint.find import open_newest
from llmtrain.checkpoint.pruned import PRUNED, PruningRecord
from llmtrain.checkpoint.start_folder import write_start_folder
from llmtrain.compress.layered import LayeredModel
from llmtrain.compress.pruning_plan import PruningSettings, plan_pruning
from llmtrain.compress.source import ModelSource, require_near
from llmtrain.compress.start_files import start_files
from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import iter_linears, num_parameters
from llmtrain.config.reading.rendering import plain_yaml
from llmtrain.errors import ExportError
from llmtrain.infer.model import checkpoint_tensors
from llmtrain.interop.hf import FAMILIES, judged
from llmtrain.interop.name_table import ReadTensor
from llmtrain.interop.proof import TOLERANCE
from llmtrain.values.batch import Batch

_ADVICE = "less --sparsity, --method wanda, or another --prune"


@dataclass(frozen=True)
class Pruned:
    """The checkpoint that was written. `zeros` is the share of the weights of its layers' linears that are zero,
    `max_difference` that of its logits from those of the model that it was made of, without what was pruned."""

    checkpoint: Path
    model: ModelConfig
    parameters_before: int
    parameters: int
    zeros: float
    before: float
    after: float
    max_difference: float
    notes: tuple[str, ...]


def prune(source: ModelSource, out: Path, asked: PruningSettings, say: Callable[[str], None]) -> Pruned:
    """Write a model with less in it as a run folder with one checkpoint of step 0. `say` hears what is being done.

    Raises as `plan_pruning` and `write_start_folder`; ExportError where the perplexity is no number, or grows by more
    than is allowed. Nothing is left behind then.
    """
    batches = source.batches("valid", "--evaluate", asked.evaluate, asked.samples)
    plan, files, measured = plan_pruning(source, asked), start_files(source), dict[str, float]()
    before = _perplexity("before", LayeredModel(source.model, source.read), batches, say)
    after = _perplexity("after", LayeredModel(plan.model, plan.read), batches, say)
    if asked.max_increase is not None:
        require_near(before, after, asked.max_increase, _ADVICE)

    def finish(folder: Path) -> None:
        files.write(folder)
        read = checkpoint_tensors(open_newest(folder), plan.model, torch.float32)
        measured["difference"] = _proved(LayeredModel(plan.model, read), plan.silenced, batches[0])
        measured["zeros"] = _share_of_zeros(plan.model, read)

    config = plain_yaml({**files.sections, "model": plan.model.model_dump(mode="json")})
    record = PruningRecord(
        kind=asked.kind,
        method=asked.method,
        perplexity_before=before,
        perplexity_after=after,
        targets=sum(batch.num_valid_tokens for batch in batches),
    )
    about = {"imported": f"pruned: {asked.kind} by {asked.method}", PRUNED: record.model_dump(), **files.about}
    checkpoint = write_start_folder(out, plan.fragments(), config, about, finish)
    return Pruned(
        checkpoint,
        plan.model,
        num_parameters(source.model),
        num_parameters(plan.model),
        measured["zeros"],
        before,
        after,
        measured["difference"],
        tuple(_not_exported(source.model, plan.model)),
    )


def _perplexity(when: str, model: LayeredModel, batches: Sequence[Batch], say: Callable[[str], None]) -> float:
    found = model.perplexity(batches)
    say(f"perplexity {when}: {found:.4f}")
    if not math.isfinite(found):
        raise ExportError(f"The perplexity {when} pruning is no number. Nothing is written. Try another checkpoint.")
    return found


def _proved(written: LayeredModel, silenced: LayeredModel, batch: Batch) -> float:
    """The largest difference between two models' logits. Raises ExportError where it is more than that of rounding."""
    found, expected = written.logits(batch), silenced.logits(batch)
    difference = float((found - expected).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(expected.abs().max()) / 10):
        raise ExportError(
            "The folder, read again, gives other logits than the model without what was pruned: they differ by up to "
            f"{difference:.2e}. Nothing is written. Please report this."
        )
    return difference


def _share_of_zeros(model: ModelConfig, read: ReadTensor) -> float:
    zeros, number = 0, 0
    for _, weight in iter_linears(model):
        tensor = read(weight.name)
        zeros, number = zeros + int((tensor == 0).sum()), number + tensor.numel()
    return zeros / number


def _not_exported(before: ModelConfig, after: ModelConfig) -> list[str]:
    """Says so where a family of transformers expresses the model, and none what is left of it."""
    fitting = [family for family in FAMILIES.values() if not judged(family, before)[0]]
    if not fitting or any(not judged(family, after)[0] for family in FAMILIES.values()):
        return []
    against = "; ".join(judged(fitting[0], after)[0])
    return [f"`llmtrain export` will refuse it, for {fitting[0].title} cannot be so: {against}"]
