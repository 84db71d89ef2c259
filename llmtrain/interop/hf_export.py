"""Writing a model as a Hugging Face folder that loads without remote code, and proving it before it is visible."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import GenerationConfig

from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import num_parameters
from llmtrain.interop.examples import ExampleTokens, Logits
from llmtrain.interop.exported_model import ExportedModel, TrainedWeights
from llmtrain.interop.families.rotary import older_rope_keys
from llmtrain.interop.folder_files import STORED_ENDS, read_json, require_free, write_record, written
from llmtrain.interop.hf import Family, family_for, hf_config, judged
from llmtrain.interop.layer_parts import LayerGroup, layer_parts
from llmtrain.interop.model_card import model_card, reader_notes
from llmtrain.interop.name_table import ReadTensor, Table, iter_theirs
from llmtrain.interop.proof import Proof, Question, compare_models, real_texts
from llmtrain.interop.text.carried import carry_config
from llmtrain.interop.text.proof import TextReader
from llmtrain.interop.text.tokenizer_json import text_frame, write_tokenizer
from llmtrain.interop.weight_files import write_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_PART = "part"


class StoredForm(Protocol):
    """Weights that lie in the files in another form than as they are, and are proved as they are read from there."""

    @property
    def unread(self) -> str | None:
        """Why transformers cannot be asked to read it; None where it can."""
        ...

    def config(self, table: Table) -> Mapping[str, Any]:
        """Keys of config.json that say how weights lie."""
        ...

    def iter_tensors(self, table: Table, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the files."""
        ...

    def reader(self, folder: Path) -> ReadTensor:
        """Reads what lies in a folder."""
        ...

    def logits(self, model: ModelConfig, read: ReadTensor) -> Logits:
        """What a model computes that is read so."""
        ...

    def unrounded(self, model: ModelConfig, read: ReadTensor) -> Logits | None:
        """The same without the rounding of activations; None where there is none."""
        ...

    def part(self, model: ModelConfig, names: Mapping[str, str]) -> "StoredForm":
        """The form of some layers as a model of their own, whose parameters have these names in the whole."""
        ...

    def accept(self, folder: Path) -> Mapping[str, str]:
        """Facts for the model card of a folder that is proved. Raises ExportError where it is not good enough."""
        ...


@dataclass(frozen=True)
class ExportSettings:
    """Settings for storing and proving weights."""

    dtype: str = "float32"
    max_shard_bytes: int = 5_000_000_000
    overwrite: bool = False
    """Replace an earlier export of the same name, once the new one is proved."""
    family: str | None = None
    """transformers' model_type; None: the first family that expresses the model."""
    proof: Literal["auto", "full", "layers"] = "auto"
    """full: both models as a whole. layers: a few layers at a time. auto: full where it takes at most `proof_bytes`."""
    proof_bytes: int = 16_000_000_000
    max_rounding: float = 0.1
    """Of updates that are added to weights, the share of their norm that rounding may change."""
    form: StoredForm | None = None
    """None: each tensor lies in the files as it is."""


@dataclass(frozen=True)
class Export:
    """The proof of an export, and notes on what the format has no key for (it matters in training alone)."""

    family: str
    proof: Proof
    notes: list[str]


@dataclass(frozen=True)
class _Export:
    """What is written: a model or some layers of it, and how."""

    trained: ExportedModel
    weights: TrainedWeights
    settings: ExportSettings
    family: Family

    def write_config(self, folder: Path) -> list[str]:
        """config.json and, for models that generate, generation_config.json; returns notes."""
        model, tokens = self.trained.config, self.trained.tokens
        config: Any = hf_config(model, tokens, self.family.config_class.model_type)
        config.dtype = DTYPES[self.settings.dtype]
        write_config_json(folder, config)
        if model.family != "encoder" and not model.predicts_labels:
            GenerationConfig.from_model_config(config).save_pretrained(folder)
        ends = tokens.ends if self.trained.chats else ()
        start_id = tokens.start_id if model.family == "encoder_decoder" else None
        notes = carry_config(folder, self.trained.tokenizer.roles.files, start_id, ends)
        if self.settings.form is not None:
            path = folder / CONFIG
            content = dict(sorted({**read_json(path), **self.settings.form.config(self.table)}.items()))
            path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
        return notes

    @property
    def table(self) -> Table:
        return self.family.tables_for(self.trained.config)[0]

    def iter_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the files."""
        dtype = DTYPES[self.settings.dtype]
        if self.settings.form is not None:
            return self.settings.form.iter_tensors(self.table, dtype)
        tensors = iter_theirs(self.table, self.trained.config, self.weights.read)
        return ((name, tensor.to(dtype)) for name, tensor in tensors)


def write_export(folder: Path, trained: ExportedModel, weights: TrainedWeights, settings: ExportSettings) -> Export:
    """Write a Hugging Face folder, load it with transformers, compare, and only then give it its name.

    Raises ConfigError where the folder exists or no family fits, ExportError where the reloaded model differs; nothing
    is left behind then.
    """
    require_free(folder, settings.overwrite, "hf")
    model = trained.config
    family = family_for(model, settings.family)
    export = _Export(trained, weights, settings, family)
    notes = list(judged(family, model)[1])
    with written(folder) as writing:
        notes += export.write_config(writing)
        text = trained.tokenizer_settings(family.config_class.model_type)
        notes += write_tokenizer(writing, trained.tokenizer, trained.tokens, text)
        write_weights(writing, export.iter_tensors(), settings.max_shard_bytes)
        if settings.form is not None:
            export = replace(export, weights=TrainedWeights(settings.form.reader(writing), settings.form.logits))
        # Proved before it has its name: a folder with the export's name is always a proved one.
        proof = _prove(writing, export)
        facts = {"Architecture": family.title, **trained.facts, "Weights": settings.dtype}
        if settings.form is not None:
            facts |= settings.form.accept(writing)
        write_record(writing, (trained.tokenizer.sha256, *trained.tokenizer.roles.equal_sha256))
        card = model_card(folder.resolve().name, model, facts, notes, proof)
        (writing / "README.md").write_text(card, "utf-8")
    return Export(family.title, proof, [*notes, *reader_notes(model)])


def _prove(folder: Path, export: _Export) -> Proof:
    """Compare the tokenizers, and the models as a whole or part by part."""
    texts, trained, weights, settings = real_texts(), export.trained, export.weights, export.settings
    model, tokens, chats = trained.config, trained.tokens, trained.chats
    reader = TextReader(folder, trained.tokenizer, text_frame(trained.tokenizer, tokens, model.family))
    token_ids = reader.compare(texts)
    if chats is not None:
        reader.compare_chats(chats)
    prompt = reader.prompt(texts[0], model.max_seq_len)
    mask, pad = tokens.mask, tokens.pad
    known = ExampleTokens(pad[1] if pad else 0, tokens.start_id, mask[1] if mask else None)
    asked = Question(token_ids, known, prompt)
    num_characters, num_chats = sum(map(len, texts)), len(chats.examples) if chats else 0
    form = settings.form
    if form is not None and form.unread is not None:
        return Proof(0.0, 0, 0, num_characters, num_chats=num_chats, unread=form.unread)
    whole = settings.proof == "full" or (settings.proof == "auto" and proof_bytes(model) <= settings.proof_bytes)
    if whole:
        ours = weights.build(model, weights.read), None if form is None else form.unrounded(model, weights.read)
        agreements = [compare_models(folder, model, ours[0], asked, ours[1])]
    else:
        agreements = []
        for part in layer_parts(model):
            logits, unrounded = _build_part(folder, part, export)
            agreements.append(compare_models(folder / _PART, part.model, logits, asked, unrounded))
            shutil.rmtree(folder / _PART)
    return replace(Proof.of(agreements, num_characters), num_chats=num_chats)


def proof_bytes(model: ModelConfig) -> int:
    """Memory that both models take in fp32."""
    return 2 * 4 * num_parameters(model)


def _build_part(folder: Path, part: LayerGroup, export: _Export) -> tuple[Logits, Logits | None]:
    """Write a part of the model from the files of the whole into a folder of its own; returns our part, and the same
    without rounding."""
    table, form, model = export.table, export.settings.form, export.trained.config
    form = None if form is None else form.part(part.model, part.own_names(table, model))
    (folder / _PART).mkdir()
    trained, settings = replace(export.trained, config=part.model), replace(export.settings, form=form)
    replace(export, trained=trained, settings=settings).write_config(folder / _PART)
    with ExitStack() as files:
        where: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = files.enter_context(safe_open(path, framework="pt"))
            where |= dict.fromkeys(file.keys(), file)

        def stored(name: str) -> Iterator[tuple[str, Tensor]]:
            for end in ("", *STORED_ENDS):
                if name + end in where:
                    yield end, where[name + end].get_tensor(name + end)

        theirs = part.their_tensors(table, model, stored)
        write_weights(folder / _PART, theirs, max_shard_bytes=settings.max_shard_bytes)
    read = part.reader(table, model, export.weights.read)
    if form is None:
        return export.weights.build(part.model, read), None
    return form.logits(part.model, read), form.unrounded(part.model, read)


CONFIG = "config.json"


def write_config_json(folder: Path, config: Any) -> None:
    """Write a configuration of transformers 5 so that transformers 4 and what reads its keys see the same model."""
    config.save_pretrained(folder)
    path = folder / CONFIG
    content = json.loads(path.read_text("utf-8"))
    content |= {"torch_dtype": content["dtype"]}
    if "rope_parameters" in content:
        content |= older_rope_keys(content["rope_parameters"])
    path.write_text(json.dumps(dict(sorted(content.items())), indent=2, ensure_ascii=False) + "\n", "utf-8")
