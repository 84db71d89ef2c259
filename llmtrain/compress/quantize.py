"""A model in whole numbers: quantized layer after layer, read again, and measured before it gets its name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llmtrain.compress.gptq import GptqQuantizer
from llmtrain.compress.layered import LayeredModel
from llmtrain.compress.source import ModelSource, require_near
from llmtrain.config.model import ModelConfig
from llmtrain.errors import ConfigError
from llmtrain.infer.chat import chat_examples
from llmtrain.infer.model import build_from, logits_of
from llmtrain.interop.compressed.choice import SCHEMES, MatrixChoice, choose
from llmtrain.interop.compressed.writing import QuantizedWeights, Quantizer
from llmtrain.interop.examples import Example
from llmtrain.interop.exported_model import ExportedModel, TrainedWeights
from llmtrain.interop.hf import family_for
from llmtrain.interop.hf_export import DTYPES, Export, ExportSettings, write_export
from llmtrain.interop.hf_import import open_hf_folder
from llmtrain.interop.name_table import ReadTensor
from llmtrain.models.rounded_inputs import round_inputs
from llmtrain.values.batch import Batch
from llmtrain.values.quantization import Quantized, round_to_nearest, unless_rounded
from llmtrain.words import perplexities_text

METHODS = ("rtn", "gptq")

_ADVICE = "--method gptq, a smaller --group, w8a16, or --keep what matters most"


@dataclass(frozen=True)
class Compression:
    """What is asked for.

    `scheme` None: that of the run's section `quantize`, with its group and what it keeps, where nothing else is said.
    `group` None: the scheme's, 0: a scale for each output. `calibrate` and `evaluate` are folders of shards or text
    files; None: the run's own, of which `samples` are taken. `max_increase` is relative to the perplexity before.
    """

    scheme: str | None
    group: int | None = None
    method: str = "rtn"
    keep: tuple[str, ...] = ()
    calibrate: str | None = None
    evaluate: str | None = None
    samples: int = 128
    max_increase: float = 0.02


@dataclass(frozen=True)
class Compressed:
    """A folder that was written: its scheme and proof, perplexities, and the matrices that are quantized."""

    scheme: str
    export: Export
    before: float
    after: float
    num_quantized: int
    form: str


def compress(
    source: ModelSource, out: Path, asked: Compression, settings: ExportSettings, say: Callable[[str], None]
) -> Compressed:
    """Write a quantized model as a Hugging Face folder. `say` hears what is being done.

    Raises ConfigError where what is asked for cannot be, and as `write_export`; ExportError where the perplexity grows
    by more than is allowed. Nothing is left behind then.
    """
    scheme, group, keep = _form_of(source, asked, say)
    source = source.as_computed()
    assert scheme in SCHEMES and asked.method in METHODS, "the command's options say so"
    family = family_for(source.model, settings.family)
    choice = choose(source.model, family, scheme, group, keep)
    batches = source.batches("valid", "--evaluate", asked.evaluate, asked.samples)
    calibration = None
    if asked.method == "gptq":
        calibration = source.batches("train", "--calibrate", asked.calibrate, asked.samples)
    elif asked.calibrate is not None:
        raise ConfigError("--calibrate: goes with --method gptq. Rounding to the nearest number needs no text.")
    before = LayeredModel(source.model, source.read).perplexity(batches)
    say(f"perplexity before: {before:.4f}")
    measured = dict[str, float]()

    def accept(folder: Path) -> Mapping[str, str]:
        written = open_hf_folder(folder)
        after = LayeredModel(written.model, written.tensor, written.rounded_inputs).perplexity(batches)
        say(f"perplexity after: {after:.4f}")
        measured["after"] = after
        require_near(before, after, asked.max_increase, _ADVICE)
        tokens = sum(batch.num_valid_tokens for batch in batches)
        return {
            "Quantized": f"{scheme} by {asked.method}: {choice.form.told.partition(';')[0]}",
            "Perplexity": perplexities_text(before, after, tokens),
        }

    dtype = DTYPES[settings.dtype]
    quantize = _quantizer(source, choice, calibration, dtype)
    form = QuantizedWeights(source.model, choice, source.read, quantize, _build, dtype, accept)
    chats = chat_examples(source.tokenizer) if source.named.is_chat else None
    trained = ExportedModel(source.model, source.tokenizer, source.named, chats, source.facts)
    export = write_export(out, trained, TrainedWeights(source.read, form.logits), replace(settings, form=form))
    return Compressed(scheme, export, before, measured["after"], len(choice.linears), choice.form.told)


def _form_of(
    source: ModelSource, asked: Compression, say: Callable[[str], None]
) -> tuple[str, int | None, tuple[str, ...]]:
    """Scheme, group and what stays. Raises ConfigError where nobody says a scheme."""
    section = source.trained_for
    if asked.scheme is not None:
        own = section is not None and (section.scheme, section.group, section.keep)
        if own and own != (asked.scheme, asked.group, asked.keep):
            say(
                f"the run was trained for {own[0]}, and another form is asked for; without --scheme it would be its own"
            )
        return asked.scheme, asked.group, asked.keep
    if section is None:
        raise ConfigError(
            f"--scheme: is needed: {source.path} was not trained with a section quantize. Try one of "
            f"{', '.join(SCHEMES)}; or --prune ffn."
        )
    return section.scheme, section.group if asked.group is None else asked.group, asked.keep or section.keep


def _quantizer(
    source: ModelSource, choice: MatrixChoice, calibration: Sequence[Batch] | None, dtype: torch.dtype
) -> Quantizer:
    if calibration is not None:
        return GptqQuantizer(LayeredModel(source.model, source.read), calibration, choice, dtype)

    def nearest(name: str, expert: int | None = None) -> Quantized:
        weight = source.read(name, expert)
        grid = choice.form.grid(weight.shape[-1])
        return unless_rounded(weight, round_to_nearest(weight, grid, dtype), grid)

    return nearest


def _build(model: ModelConfig, read: ReadTensor, rounded: frozenset[str]) -> Callable[[Example], torch.Tensor]:
    built = build_from(model, read)
    round_inputs(built, rounded)
    return lambda example: logits_of(built, example)
