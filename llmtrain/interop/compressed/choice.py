"""Which matrices of a model become whole numbers, and the form in which its class in transformers can read them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from llmtrain.config.finetune import NUMBER_SCHEMES
from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import is_kept, iter_linears
from llmtrain.errors import ConfigError
from llmtrain.interop.compressed.form import QuantizedForm
from llmtrain.interop.compressed.tensors import WEIGHT
from llmtrain.interop.hf import Family
from llmtrain.interop.name_table import Shape, Table, head_name, is_transposed, pairings

SCHEMES: dict[str, QuantizedForm] = {
    name: QuantizedForm(scheme.bits, scheme.group, scheme.rounds_inputs) for name, scheme in NUMBER_SCHEMES.items()
}
"""By --scheme, with the group that each has where none is asked for."""


@dataclass(frozen=True)
class Traits:
    """What a class of transformers needs, or does: see `QuantizedForm`, `MatrixChoice`; `no_rounded_inputs` says why it
    rounds none."""

    dequantize: bool = False
    rounds_experts: bool = False
    no_rounded_inputs: str = ""


TRAITS = {
    "gpt2": Traits(
        dequantize=True,
        no_rounded_inputs="its class in transformers has Conv1D modules in place of linears, whose inputs "
        "compressed-tensors does not round",
    ),
    "t5": Traits(dequantize=True),
    "switch_transformers": Traits(
        dequantize=True,
        no_rounded_inputs="its class in transformers stacks the experts, and reads no int8 ones",
    ),
    "mixtral": Traits(
        rounds_experts=True, no_rounded_inputs="its class in transformers stacks the experts, and reads no int8 ones"
    ),
}
"""By transformers' model_type; others need nothing. T5's class asks for a matrix before it is made."""


@dataclass(frozen=True)
class MatrixChoice:
    """The form, and our linears that lie in it; all others stay as they are.

    `rounds_experts`: transformers makes one tensor of the experts of a layer when it loads, in the type of the scales,
    whatever type it is asked for. Other readers do not.
    """

    form: QuantizedForm
    linears: frozenset[str]
    rounds_experts: bool = False

    def is_quantized(self, name: str) -> bool:
        """True for the weight of a chosen linear, by its global name."""
        return name.removesuffix(WEIGHT) in self.linears

    def ignored(self, table: Table, model: ModelConfig) -> list[str]:
        """Modules of transformers that are linears and stay as they are, for config.json."""
        found = [] if model.predicts_labels else [head_name(table).removesuffix(WEIGHT)]
        for pairing in pairings(table, model):
            name = pairing.ours[0]
            plain = name.startswith("embeddings.") or name.endswith(("_norm.weight", ".norm.weight", "_bias.weight"))
            if pairing.theirs.endswith(WEIGHT) and not plain and not self.is_quantized(name):
                found.append(pairing.theirs.removesuffix(WEIGHT))
        return sorted(set(found))


def choose(model: ModelConfig, family: Family, scheme: str, group: int | None, keep: Sequence[str]) -> MatrixChoice:
    """The choice that the options of the command ask for: of the linears in layers all but those that `keep` names, as
    finetune.lora.targets names them.

    `group` 0: a scale for each output. Raises ConfigError where transformers could not read it, or a group does not
    divide a matrix.
    """
    form, traits = SCHEMES[scheme], TRAITS.get(family.config_class.model_type, Traits())
    if form.rounds_inputs and traits.no_rounded_inputs:
        raise ConfigError(f"--scheme {scheme}: not for {family.title}: {traits.no_rounded_inputs}. Try w8a16.")
    if form.rounds_inputs and group:
        raise ConfigError(f"--group {group}: goes with w8a16 and w4a16. With {scheme} each output has one scale.")
    if group is not None:
        form = replace(form, group=group or None)
    sizes = {name: (weight.shape[-2], weight.shape[-1]) for name, weight in iter_linears(model)}
    kept = _kept(sizes, keep)
    linears = frozenset(name for name in sizes if name not in kept)
    if not linears:
        raise ConfigError(f"--keep {' '.join(keep)}: leaves nothing to quantize.")
    table = family.tables_for(model)[0]
    _require_whole(table, model, linears)
    if form.group is not None:
        _require_divisor(form.group, {name: sizes[name][1] for name in sorted(linears)})
    if is_transposed(table):  # a block of rows, of which the largest matrix has one where each output has one scale
        form = replace(form, transposed=True, group=form.group or max(inputs for _, inputs in sizes.values()))
    form = replace(form, dequantize=traits.dequantize and not form.rounds_inputs)
    return MatrixChoice(form, linears, traits.rounds_experts)


def _kept(linears: Iterable[str], keep: Sequence[str]) -> set[str]:
    """The linears that patterns name. Raises ConfigError for a pattern that fits none."""
    kept = set[str]()
    for pattern in keep:
        found = {name for name in linears if is_kept(name, pattern)}
        if not found:
            shown = ", ".join(list(linears)[:3])
            raise ConfigError(
                f"--keep {pattern}: fits none of the matrices that are quantized, such as {shown}. Name them with "
                "patterns, or a kind of block: attention, attention.q, mlp, mlp.down. The head, embeddings, norms and "
                "routers stay in any case."
            )
        kept |= found
    return kept


def _require_whole(table: Table, model: ModelConfig, linears: frozenset[str]) -> None:
    """Raise ConfigError where a module of transformers would be quantized in part, or experts left as they are."""
    for pairing in pairings(table, model):
        modules = [name.removesuffix(WEIGHT) for name in pairing.ours]
        chosen = [name for name in modules if name in linears]
        if chosen and len(chosen) < len(modules):
            raise ConfigError(
                f"--keep: {', '.join(modules)} are one matrix in transformers: keep all of them, or none."
            )
        if pairing.shape is Shape.EXPERT and not chosen:
            raise ConfigError(
                f"--keep: {modules[0]}: transformers reads all experts of a quantized model as quantized. Keep others."
            )


def _require_divisor(group: int, inputs: dict[str, int]) -> None:
    wrong = {name: size for name, size in inputs.items() if size % group}
    if wrong:
        name, size = next(iter(wrong.items()))
        fitting = [str(number) for number in (128, 64, 32, 16) if all(other % number == 0 for other in inputs.values())]
        advice = f"Try {', '.join(fitting)}, or 0" if fitting else "Try 0"
        raise ConfigError(
            f"--group {group}: does not divide the {size} inputs of {name}. {advice} for one scale of each output, or "
            "--keep it."
        )
