"""Between runs and folders of adapters: what a finetuning has added, as PEFT or AdapterHub has it, and back."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file

from llmtrain.checkpoint.find import find_checkpoint
from llmtrain.checkpoint.folders import BASE
from llmtrain.checkpoint.reader import CheckpointReader
from llmtrain.checkpoint.saved_run import saved_architecture, saved_finetune
from llmtrain.errors import ConfigError, ExportError
from llmtrain.infer.hugging_face import Imported, training_facts, write_imported
from llmtrain.infer.tokenizer import folder_tokenizer
from llmtrain.interop.adapterhub import WEIGHTS, adapterhub_files, write_adapterhub
from llmtrain.interop.folder_files import require_free, written
from llmtrain.interop.hf import family_for
from llmtrain.interop.hf_import import open_hf_folder
from llmtrain.interop.peft.reading import open_peft_folder, read_settings
from llmtrain.interop.peft.writing import PROMPT, PeftSettings, TrainedAdapter, write_peft

TOLERANCES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""The largest relative difference of an update that is read again: rounding of A and of B."""


@dataclass(frozen=True)
class AdapterExport:
    """An adapter that was written: its family, and the largest relative difference of an update that was read again."""

    family: str
    max_difference: float


def trained_adapter(checkpoint: CheckpointReader, family: str | None = None) -> TrainedAdapter:
    """What a checkpoint's run has trained beside its base. Raises ConfigError where it is the whole model."""
    model, finetune = saved_architecture(checkpoint), saved_finetune(checkpoint)
    if finetune is None or finetune.method == "full":
        raise ConfigError(
            f"{checkpoint.path}: the whole model was trained, so there is no adapter. Try --to hf, or train one with "
            "finetune.method=lora."
        )
    return TrainedAdapter(checkpoint, model, finetune, family_for(model, family))


def export_adapter(
    source: Path,
    out: Path,
    to: Literal["peft", "adapterhub"],
    settings: PeftSettings,
    overwrite: bool = False,
    family: str | None = None,
) -> tuple[CheckpointReader, AdapterExport]:
    """Write the adapter of the checkpoint that a path means as a folder, and read it again before it has its name.

    Facts for the card are filled in. Raises as `find_checkpoint` and the writers do; ExportError where what is read is
    not what was trained.
    """
    require_free(out, overwrite, to)
    checkpoint = find_checkpoint(source)
    adapter = trained_adapter(checkpoint, family)
    facts = training_facts(checkpoint)
    about = checkpoint.about.get(BASE)
    if isinstance(about, dict):
        facts["Base"] = f"weights of a checkpoint whose manifest has sha256 {about['manifest_sha256']}"
    settings = replace(settings, facts={**facts, **settings.facts})
    with written(out) as folder:
        if to == "peft":
            write_peft(folder, adapter, settings)
            difference = _difference(folder, adapter)
        else:
            write_adapterhub(folder, adapter, settings)
            stored, trained = load_file(folder / WEIGHTS), adapterhub_files(adapter, None)[1]
            difference = max(_apart(stored[name].float(), tensor) for name, tensor in trained.items())
        if not difference <= TOLERANCES[settings.dtype]:
            raise ExportError(
                f"{out}: an update of the adapter differs by {difference:.3g} from the trained one when it is read "
                "again. Nothing is left of the folder."
            )
    return checkpoint, AdapterExport(adapter.family.title, difference)


def _difference(folder: Path, adapter: TrainedAdapter) -> float:
    """How far what is read of a folder is from what was trained: of updates their products, relative to their norms."""
    found = open_peft_folder(folder, adapter.family, adapter.model)
    if adapter.finetune.method == "prompt":
        prompt = adapter.read(PROMPT, tuple(found.tensors[PROMPT].shape))
        return _apart(found.tensors[PROMPT], prompt)
    worst = 0.0
    for linear, (a, b) in adapter.pairs().items():
        stem = f"{linear}.lora_" if f"{linear}.lora_a" in found.tensors else f"{linear}_lora_"
        read = found.finetune.lora.scale * (found.tensors[f"{stem}b"] @ found.tensors[f"{stem}a"])
        worst = max(worst, _apart(read, adapter.finetune.lora.scale * (b @ a)))
    for name in adapter.trained_also():
        worst = max(worst, _apart(found.tensors[name], adapter.read(name, tuple(found.tensors[name].shape))))
    return worst


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    norm = float(other.norm())
    return float((one - other).norm()) / norm if norm else float(one.norm())


def import_adapter(source: Path, base: Path | None, out: Path) -> Imported:
    """Read a PEFT folder and the Hugging Face folder that it goes with, and write OUT: the base's weights and what the
    adapter adds to them, with the section finetune that says so."""
    named = read_settings(source).get("base_model_name_or_path")
    if base is None:
        told = f", which names {named!r:.200}," if named else ""
        raise ConfigError(
            f"{source}: is an adapter and needs the folder of its base{told}: give --base FOLDER, with the config.json "
            "and safetensors of the model that it was trained on."
        )
    folder = open_hf_folder(base)
    found = folder_tokenizer(base, folder.model)
    adapter = open_peft_folder(source, folder.family, folder.model)
    return Imported(folder, found, write_imported(folder, found, out, adapter=adapter))
