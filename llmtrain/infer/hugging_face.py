"""Between runs and Hugging Face folders: a checkpoint exported as one, and one imported as a run folder."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from llmtrain.checkpoint.find import find_checkpoint
from llmtrain.checkpoint.pruned import pruning_record
from llmtrain.checkpoint.reader import CheckpointReader
from llmtrain.checkpoint.saved_run import (
    saved_architecture,
    saved_config,
    saved_data,
    saved_finetune,
    saved_quantize,
)
from llmtrain.checkpoint.start_folder import PART_BYTES, write_start_folder
from llmtrain.config.data import ObjectiveName, needed_tokens
from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import parameter_shapes
from llmtrain.config.reading.rendering import plain_yaml
from llmtrain.data.storage.manifest import MANIFEST_BYTES
from llmtrain.data.token_roles import TrainedTokens
from llmtrain.errors import ConfigError, ExportError
from llmtrain.files import read_bytes
from llmtrain.finetune.merging import MergedWeights
from llmtrain.finetune.rounded_weights import computed_weights
from llmtrain.finetune.rounding import rounding_error
from llmtrain.infer.chat import chat_examples
from llmtrain.infer.model import (
    build_from,
    checkpoint_tensors,
    find_tokenizer_of,
    logits_of,
)
from llmtrain.infer.tokenizer import FolderTokenizer, decoder_start, folder_tokenizer, model_tokenizer
from llmtrain.interop.exported_model import ExportedModel, TrainedWeights
from llmtrain.interop.hf_export import DTYPES, Export, ExportSettings, write_export
from llmtrain.interop.hf_import import open_hf_folder
from llmtrain.interop.peft.reading import PeftFolder
from llmtrain.interop.text.special_tokens import named_tokens
from llmtrain.values.fragment import Box, Fragment, FragmentSource
from llmtrain.values.tokenizer import Tokenizer


def export_checkpoint(
    source: Path, out: Path, tokenizer: Path | None, settings: ExportSettings
) -> tuple[CheckpointReader, Export]:
    """Write the checkpoint that a path means, and prove the export.

    Raises as `open_trained`, `trained_weights` and `write_export` do.
    """
    checkpoint, trained = open_trained(source, tokenizer)
    weights = trained_weights(checkpoint, trained.config, settings.dtype)
    facts = merging_facts(checkpoint, trained.config, settings)
    return checkpoint, write_export(out, trained.with_facts(facts), weights, settings)


def open_trained(source: Path, tokenizer: Path | None) -> tuple[CheckpointReader, ExportedModel]:
    """The checkpoint that a path means, and its model with the facts of its training.

    `tokenizer` takes the place of the one beside the checkpoints. Raises as `find_checkpoint` and `model_tokenizer` do.
    """
    checkpoint = find_checkpoint(source)
    config = saved_architecture(checkpoint)
    found = find_tokenizer_of(checkpoint.path)
    text = model_tokenizer(tokenizer, found, config, TrainedTokens.of(checkpoint.about))
    named = named_tokens(text, saved_data(checkpoint))
    if config.predicts_labels and config.family == "encoder" and text.cls_id is not None and text.sep_id is not None:
        named = replace(named, around=((text.cls_id,), (text.sep_id,)))  # as `data labels` frames texts
    chats = chat_examples(text) if named.is_chat else None
    return checkpoint, ExportedModel(config, text, named, chats, training_facts(checkpoint))


def trained_weights(checkpoint: CheckpointReader, config: ModelConfig, dtype: str = "float32") -> TrainedWeights:
    """The weights of a checkpoint, rounded to `dtype`. Raises as `merged` does."""
    read = checkpoint_tensors(merged(checkpoint, config), config, DTYPES[dtype])
    return TrainedWeights(read, lambda part, read_part: partial(logits_of, build_from(part, read_part)))


def merged(checkpoint: CheckpointReader, model: ModelConfig) -> FragmentSource:
    """The weights of a plain model. Raises ConfigError where what was trained beside them cannot be added to them."""
    finetune = saved_finetune(checkpoint)
    if finetune is None or finetune.method == "full":
        return checkpoint
    if finetune.method == "lora":
        return MergedWeights(computed_weights(checkpoint, model), model, finetune)
    raise ConfigError(
        f"{checkpoint.path}: was trained with finetune.method = {finetune.method}, which adds what no class of Hugging "
        f"Face's has. Try --to {'adapterhub' if finetune.method == 'adapter' else 'peft'}; `llmtrain generate` uses it "
        "from here."
    )


def merging_facts(checkpoint: CheckpointReader, model: ModelConfig, settings: ExportSettings) -> dict[str, str]:
    """What the model card says of updates that were added to weights. Raises ExportError where rounding has eaten more
    of them than is allowed."""
    finetune = saved_finetune(checkpoint)
    if finetune is None or finetune.method != "lora":
        return {}
    error = rounding_error(computed_weights(checkpoint, model), model, finetune, DTYPES[settings.dtype])
    told = f"rounding to {settings.dtype} has changed the updates by {error:.2%}"
    if error > settings.max_rounding:
        raise ExportError(
            f"{checkpoint.path}: merged, {told} of their norm, and --max-rounding = {settings.max_rounding:g} allows "
            f"{settings.max_rounding:.0%}. Try --dtype float32, or --to peft, which keeps them apart, or allow it with "
            f"--max-rounding {math.ceil(100 * error) / 100:g}."
        )
    return {"Merged": f"low-rank updates in fp32; {told} of their norm"}


def rounding_notes(checkpoint: CheckpointReader, to_base: bool = False) -> list[str]:
    """What an export does not say of a run that has rounded weights. `to_base`: it holds what goes to a base alone."""
    quantize, finetune = saved_quantize(checkpoint), saved_finetune(checkpoint)
    if quantize is None:
        return []
    if finetune is None or finetune.method == "full":
        told = f"weights are as they were trained, before training rounded them to {quantize.scheme}; "
        return [f"{told}`llmtrain compress` writes the rounded ones"]
    if to_base:
        return [f"was trained on a base rounded to {quantize.scheme}: it belongs on one that is rounded alike"]
    return [f"the base is the one that was trained on: rounded to {quantize.scheme}"]


def training_facts(checkpoint: CheckpointReader) -> dict[str, str]:
    """The model card's facts about training and pruning. Data sets are named by the hash of their manifest, not by a
    path."""
    config = saved_config(checkpoint)
    progress = checkpoint.state.get("train", {})
    facts = {"Run": str(config.get("name", "imported")), "Training steps": f"{checkpoint.step:,}"}
    if isinstance(progress, dict) and isinstance(progress.get("tokens"), int):
        facts["Training tokens"] = f"{progress['tokens']:,}"
    paths = [source.get("path") for source in saved_data(checkpoint).get("train") or () if isinstance(source, dict)]
    manifests = [Path(path, "manifest.json") for path in paths if isinstance(path, str)]
    found = [path for path in manifests if path.is_file()]
    hashes = [hashlib.sha256(read_bytes(path, MANIFEST_BYTES)).hexdigest() for path in found]
    if hashes:
        facts["Training data"] = ", ".join(f"manifest sha256 {value}" for value in hashes)
    if pruned := pruning_record(checkpoint.path, checkpoint.about):
        facts["Pruned" if checkpoint.step == 0 else "Pruned before this training"] = pruned.told()
    return facts


class WeightSource(Protocol):
    """A folder or file of another program's whose weights are a model of ours."""

    @property
    def model(self) -> ModelConfig: ...

    @property
    def title(self) -> str:
        """What it is, in words."""
        ...

    @property
    def notes(self) -> list[str]:
        """What of it is not taken over."""
        ...

    def iter_tensors(self) -> Iterator[tuple[str, int | None, Tensor]]:
        """Every parameter in fp32: (global name, expert where it is that of one, tensor)."""
        ...


@dataclass(frozen=True)
class Imported:
    """What was read, the tokenizer found in it, and the checkpoint that was written."""

    folder: WeightSource
    tokenizer: FolderTokenizer
    checkpoint: Path


def import_folder(source: Path, out: Path) -> Imported:
    """Read a Hugging Face folder and write OUT. Weights are read and written some at a time."""
    folder = open_hf_folder(source)
    found = folder_tokenizer(source, folder.model)
    return Imported(folder, found, write_imported(folder, found, out))


def write_imported(
    folder: WeightSource,
    found: FolderTokenizer,
    out: Path,
    part_bytes: int = PART_BYTES,
    adapter: PeftFolder | None = None,
) -> Path:
    """Write OUT as a run folder with one checkpoint; returns the checkpoint. Nothing is left where it fails."""
    config_text = _config_yaml(folder, found.tokenizer, adapter)
    about = {"imported": folder.title, **found.about()}
    return write_start_folder(out, _iter_fragments(folder, adapter), config_text, about, found.write, part_bytes)


def _iter_fragments(folder: WeightSource, adapter: PeftFolder | None) -> Iterator[Fragment]:
    """Every tensor of a folder as a fragment, and of an adapter; each expert of stacked ones is one."""
    shapes, added = parameter_shapes(folder.model), adapter.tensors if adapter else {}
    for name, tensor in added.items():
        yield Fragment.whole(name, "master", tensor)
    for name, expert, tensor in folder.iter_tensors():
        if name in added:
            continue
        if expert is None:
            yield Fragment.whole(name, "master", tensor)
        else:
            box = Box((expert, *[0] * tensor.dim()), (1, *tensor.shape))
            yield Fragment(name, "master", shapes[name], box, tensor[None])


def _config_yaml(folder: WeightSource, tokenizer: Tokenizer | None, adapter: PeftFolder | None) -> str:
    """The base for a run's configuration: the model, the objective that suits it, and what an adapter adds."""
    config = start_config(folder.model, tokenizer)
    if adapter is not None:
        config["finetune"] = adapter.finetune.model_dump(mode="json", exclude_unset=True)
    return plain_yaml(config)


def start_config(model: ModelConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Of a model that no run says anything of: itself, and the objective that suits it."""
    config: dict[str, Any] = {"model": model.model_dump(mode="json")}
    if model.predicts_labels:
        return config | {"data": {"objective": "labels"}}
    objectives: dict[str, ObjectiveName] = {"encoder": "masked", "encoder_decoder": "span_corruption"}
    if objective := objectives.get(model.family):
        special = folder_special_tokens(model, tokenizer, objective)
        config["data"] = {"objective": objective, "special_tokens": special}
    return config


def folder_special_tokens(
    model: ModelConfig, tokenizer: Tokenizer | None, objective: ObjectiveName | None = None
) -> dict[str, Any]:
    """Ids of a folder's tokenizer for data.special_tokens: those that the objective needs, or all that there are."""
    if tokenizer is None:
        return {}
    named = named_tokens(tokenizer)
    # Of an encoder-decoder, padding begins what the decoder reads.
    start = decoder_start(tokenizer) if model.family == "encoder_decoder" else None
    found = {
        "mask": named.mask and named.mask[1],
        "pad": named.pad and named.pad[1] if start is None else start,
        "sentinels": list(named.sentinels.values()) or None,
    }
    needed = found if objective is None else needed_tokens(model.family, objective)
    return {key: found[key] for key in needed if found[key] is not None}
