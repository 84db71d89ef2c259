"""Writing a model as a GGUF file, in a folder with its card, and proving it in llama.cpp before it has its name."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmtrain.config.model import ModelConfig
from llmtrain.errors import ExportError
from llmtrain.interop.examples import Example, Logits
from llmtrain.interop.exported_model import ExportedModel, TrainedWeights
from llmtrain.interop.folder_files import RECORD_NAME, require_free, sha256_of, written
from llmtrain.interop.gguf.architectures import (
    KEPT_WHOLE,
    ROPE_FACTORS,
    ROPE_RULE,
    Architecture,
    architecture_for,
    context_length,
    rope_factors,
)
from llmtrain.interop.gguf.card import gguf_card
from llmtrain.interop.gguf.file_format import FILE_TYPES, QUANTIZED_BLOCK, TensorType, Value
from llmtrain.interop.gguf.importing import open_gguf
from llmtrain.interop.gguf.proof import (
    NUM_WINDOWS,
    Bound,
    LlamaCppProof,
    LlamaCppQuestions,
    can_prove,
    prove,
)
from llmtrain.interop.gguf.vocabulary import FileVocabulary, file_vocabulary
from llmtrain.interop.gguf.writing import GgufPart, write_file
from llmtrain.interop.hf import FAMILIES, family_for
from llmtrain.interop.name_table import Pairing, pairings, their_shape, to_theirs
from llmtrain.interop.proof import real_texts
from llmtrain.interop.text.proof import NUM_GREEDY, Prompt
from llmtrain.interop.text.tokenizer_json import text_frame

_LONGEST_PROMPT = 16
MEASURED, MEASURED_LENGTH = 16, 256
"""Windows of text that perplexity is measured on, and their tokens."""


@dataclass(frozen=True)
class GgufSettings:
    """How weights are stored and proved."""

    type: TensorType = TensorType.F32
    max_perplexity_increase: float = 0.02
    """Of the perplexity of the trained weights, the share that storing may add."""
    overwrite: bool = False
    family: str | None = None
    held_out: Sequence[Sequence[int]] = ()
    """Windows of validation data; empty: the texts of the proof."""


@dataclass(frozen=True)
class GgufExport:
    """What was written and found. `proof` is None where llama.cpp is not installed: then nothing was proved there."""

    file: str
    architecture: str
    perplexities: tuple[float, float]
    """Of the trained weights, and of those in the file."""
    proof: LlamaCppProof | None
    notes: list[str]


@dataclass(frozen=True)
class _Export:
    """What is written: a model, and the forms that it and its vocabulary have there."""

    trained: ExportedModel
    weights: TrainedWeights
    settings: GgufSettings
    architecture: Architecture
    vocabulary: FileVocabulary

    def metadata(self) -> dict[str, Value]:
        """All keys of the file, in the order in which they are written."""
        model = self.trained.config
        keys: dict[str, Value] = {
            "general.architecture": self.architecture.name,
            "general.type": "model",
            "general.quantization_version": 2,
            "general.file_type": FILE_TYPES[self.settings.type],
            **self.architecture.keys_of(model),
        }
        if (scaling := model.rope_scaling) is not None and scaling.kind == "llama3":
            rule = (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_seq_len)
            keys[ROPE_RULE] = [float(number) for number in rule]
        return keys | self.vocabulary.keys

    def tensors(self) -> Iterator[GgufPart]:
        model = self.trained.config
        scaling = model.rope_scaling
        if scaling is not None and scaling.kind == "llama3":
            size, theta = model.head_size, model.rope_theta
            yield GgufPart(ROPE_FACTORS, (size // 2,), TensorType.F32, lambda: rope_factors(scaling, size, theta))
        for pairing in pairings(self.architecture.table, model):
            shape = their_shape(pairing, model)

            def read(pairing: Pairing = pairing) -> Tensor:
                return to_theirs(pairing, [self.weights.read(name) for name in pairing.ours], model)

            yield GgufPart(pairing.theirs, shape, stored_type(pairing.theirs, shape, self.settings.type), read)


def stored_type(name: str, shape: tuple[int, ...], wanted: TensorType) -> TensorType:
    """The type of a tensor in a file that is to have `wanted`: vectors, and matrices that llama.cpp's converter keeps
    as they are, are in fp32; rows that Q8_0 cannot divide are in fp16."""
    if len(shape) == 1 or name.endswith(KEPT_WHOLE):
        return TensorType.F32
    if wanted is TensorType.Q8_0 and shape[-1] % QUANTIZED_BLOCK:
        return TensorType.F16
    return wanted


def write_gguf(folder: Path, trained: ExportedModel, weights: TrainedWeights, settings: GgufSettings) -> GgufExport:
    """Write a folder with NAME.gguf, a card and a record, prove it, and only then give it its name.

    Raises ConfigError where the folder exists or llama.cpp has no such model, ExportError where the tokenizer has no
    form there, where the perplexity grows too much, or where llama.cpp computes something else. Nothing is left then.
    """
    require_free(folder, settings.overwrite, "gguf")
    model, chats = trained.config, trained.chats
    family = family_for(model, settings.family)
    kind = next(kind for kind, known in FAMILIES.items() if known is family)
    architecture = architecture_for(model, kind, family.title)
    template, controls = (None, frozenset[int]()) if chats is None else (chats.template, chats.controls)
    vocabulary = file_vocabulary(trained.tokenizer, trained.tokens, model.vocabulary, template, controls)
    export = _Export(trained, weights, settings, architecture, vocabulary)
    name = folder.resolve().name
    with written(folder) as writing:
        file = writing / f"{name}.gguf"
        stored = list(export.tensors())
        write_file(file, export.metadata(), stored)
        perplexities, proof = _proved(file, export)
        found = GgufExport(file.name, architecture.name, perplexities, proof, _notes(export, stored))
        facts = {**trained.facts, "Weights": settings.type.name}
        (writing / "README.md").write_text(gguf_card(name, model, facts, found), "utf-8")
        record = {
            "proved": None if proof is None else proof.to_json(),
            "perplexities": list(perplexities),
            "files": {file.name: sha256_of(file)},
        }
        (writing / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    return found


def _notes(export: _Export, stored: Sequence[GgufPart]) -> list[str]:
    notes, model, wanted = [*export.vocabulary.notes], export.trained.config, export.settings.type
    if context_length(model) < model.max_seq_len:
        notes.append(f"llama.cpp has no window for this model: the file is for texts of {context_length(model)} tokens")
    halves = [tensor.name for tensor in stored if tensor.type is TensorType.F16 and wanted is TensorType.Q8_0]
    if halves:
        notes.append(f"{len(halves)} tensors have rows that are no multiple of {QUANTIZED_BLOCK}, and are in F16")
    return notes


def _proved(file: Path, export: _Export) -> tuple[tuple[float, float], LlamaCppProof | None]:
    """The perplexities before and after, and what llama.cpp makes of the file."""
    settings, trained, model = export.settings, export.trained, export.trained.config
    texts = real_texts()
    ids = [trained.tokenizer.encode(text) for text in texts]
    windows = settings.held_out or _windows([token for text in ids for token in text], model)
    before = _perplexity(export.weights.build(model, export.weights.read), windows)
    # What llama.cpp is compared with are the numbers in the file, read again.
    ours = export.weights.build(model, open_gguf(file).tensor)
    after = _perplexity(ours, windows)
    if settings.type is TensorType.F32 and before != after:
        raise ExportError(f"The file holds other weights: perplexity {before!r} with those trained, {after!r} with it.")
    if not after <= before * (1 + settings.max_perplexity_increase):
        raise ExportError(
            f"As {settings.type.name}, perplexity grows from {before:.4f} to {after:.4f}, by {after / before - 1:.2%}, "
            f"and --max-perplexity-increase = {settings.max_perplexity_increase:g} allows "
            f"{settings.max_perplexity_increase:.2%}. Try --dtype float16, or allow it."
        )
    if not can_prove():
        return (before, after), None
    frame = text_frame(trained.tokenizer, trained.tokens, "decoder")
    longest = max(1, min(_LONGEST_PROMPT, context_length(model) - NUM_GREEDY))
    prompt = Prompt((*frame[0], *ids[0][:longest]), {})
    equal = [text for text in texts if export.vocabulary.is_equal_for(text)]
    num_new = min(NUM_GREEDY, context_length(model) - len(prompt.ids))
    asked = LlamaCppQuestions(equal, windows[:NUM_WINDOWS], prompt, trained.chats, num_new, trained.tokenizer, frame)
    return (before, after), prove(file, ours, model.vocabulary, asked, Bound.of(model, settings.type))


def _windows(ids: Sequence[int], model: ModelConfig) -> list[Sequence[int]]:
    """Windows of real tokens. Raises ExportError for ids that the model does not have."""
    length = min(MEASURED_LENGTH, context_length(model))
    if max(ids) >= model.vocabulary:
        raise ExportError(
            f"The tokenizer gives the id {max(ids)}, the model has {model.vocabulary} tokens: it was trained with "
            "another tokenizer. Name that one."
        )
    return [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)][:MEASURED]


@torch.no_grad()
def _perplexity(ours: Logits, windows: Sequence[Sequence[int]]) -> float:
    """Over the tokens of windows of one length, each predicted from those before it."""
    tokens_BS = torch.tensor([list(window) for window in windows])
    total = torch.zeros((), dtype=torch.float64)
    for row_S in tokens_BS:
        logits_SV = ours(Example(row_S[None]))[0, :-1].cpu().double()
        total += torch.nn.functional.cross_entropy(logits_SV, row_S[1:], reduction="sum")
    return float(torch.exp(total / (tokens_BS.numel() - len(tokens_BS))))
