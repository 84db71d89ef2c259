"""What pruning a model once leaves of it: which parts or weights, and what reads them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from llmtrain.compress.importance import ByMagnitude, ByText
from llmtrain.compress.layered import LayeredModel
from llmtrain.compress.smaller import KINDS, fewer_parts, iter_blocks, smaller_model
from llmtrain.compress.source import ModelSource
from llmtrain.compress.zeros import choose_zeros, input_norms
from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import parameter_shapes
from llmtrain.errors import ConfigError
from llmtrain.interop.name_table import ReadTensor
from llmtrain.values.batch import Batch
from llmtrain.values.fragment import Fragment


@dataclass(frozen=True)
class PruningSettings:
    """What is asked for.

    `kind` is weights or 2:4, which make zeros, or heads, ffn or layers, which are left out; `sparsity` the share,
    `method` magnitude or wanda. `keep` are linears without zeros. `calibrate` and `evaluate` are folders of shards or
    text files; None: the run's own, of which `samples` are taken. `max_increase` is relative to the perplexity before;
    None: any.
    """

    kind: str
    sparsity: float = 0.5
    method: str = "magnitude"
    keep: tuple[str, ...] = ()
    calibrate: str | None = None
    evaluate: str | None = None
    samples: int = 128
    max_increase: float | None = None


@dataclass(frozen=True)
class PruningPlan:
    """What is left: a model, and what reads its tensors. `silenced` is the one that was pruned, in its own size, where
    what is pruned adds nothing: it has the same logits."""

    model: ModelConfig
    read: ReadTensor
    silenced: LayeredModel

    def fragments(self) -> Iterator[Fragment]:
        """Its weights, a tensor at a time."""
        for name in parameter_shapes(self.model):
            yield Fragment.whole(name, "master", self.read(name).contiguous())


def plan_pruning(source: ModelSource, asked: PruningSettings) -> PruningPlan:
    """Raises ConfigError where the model has nothing of that kind to leave out, or there is no text to go by."""
    model, kind = source.model, asked.kind
    if model.moe is not None and model.moe.bias_update_rate:
        raise ConfigError(
            f"model.moe.bias_update_rate = {model.moe.bias_update_rate:g}: its routers choose by biases that a folder "
            "to begin from does not hold. Prune in training instead: the section prune."
        )
    if kind not in KINDS:
        return _with_zeros(source, asked)
    if asked.keep:
        raise ConfigError(f"--keep: goes with --prune weights and 2:4. Of {kind} all layers keep equally many.")
    changed, text = fewer_parts(model, kind, asked.sparsity), _calibration(source, asked)
    blocks = list(iter_blocks(model, kind))
    importance = ByText(LayeredModel(model, source.read), text, blocks) if text else ByMagnitude(model, source.read)
    smaller = smaller_model(model, changed, kind, importance)
    silenced = LayeredModel(model, smaller.silenced(source.read, blocks), without=smaller.left_out)
    return PruningPlan(changed, smaller.cut(source.read), silenced)


def _with_zeros(source: ModelSource, asked: PruningSettings) -> PruningPlan:
    if asked.kind == "2:4" and asked.sparsity != PruningSettings.sparsity:
        raise ConfigError(f"--sparsity {asked.sparsity:g}: of 2:4 it is 0.5. Leave it out, or try --prune weights.")
    zeros = choose_zeros(source.model, asked.kind, asked.sparsity, asked.keep)
    if text := _calibration(source, asked):
        zeros = replace(zeros, norms=input_norms(zeros, LayeredModel(source.model, source.read), text))
    read = zeros.cut(source.read)
    return PruningPlan(source.model, read, LayeredModel(source.model, read))


def _calibration(source: ModelSource, asked: PruningSettings) -> Sequence[Batch]:
    """What to go by; nothing by magnitude."""
    if asked.method == "wanda":
        return source.batches("train", "--calibrate", asked.calibrate, asked.samples)
    if asked.calibrate is not None:
        raise ConfigError("--calibrate: goes with --method wanda. Magnitudes need no text.")
    return ()
