"""Writing what finetuning has added to a model as a folder that PEFT reads. Equal tensors give equal bytes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llmtrain.config.finetune import FinetuneConfig
from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import LABEL_HEADS, FrozenNames, declare_parameters, parameter_shapes
from llmtrain.errors import ConfigError
from llmtrain.interop.hf import Family
from llmtrain.interop.name_table import Pairing, Shape, head_name, pairings, to_theirs
from llmtrain.interop.peft.card import adapter_card
from llmtrain.interop.peft.modules import (
    PREFIX,
    joined,
    live_table,
    lora_modules,
    module_of,
    short_names,
    tensor_stems,
)
from llmtrain.interop.peft.settings import CONFIG, WEIGHTS, joined_alpha, lora_settings, prompt_settings
from llmtrain.values.fragment import Box, FragmentSource

PROMPT, WORD = "embeddings.prompt.weight", "embeddings.word.weight"
PROMPT_FILE = "prompt_embeddings"

Pair = tuple[Tensor, Tensor]
Files = tuple[dict[str, Any], dict[str, Tensor]]
"""The content of adapter_config.json, and the tensors in fp32 by their names in the file."""


@dataclass(frozen=True)
class PeftSettings:
    """The type of the tensors, the base's name or folder in adapter_config.json, and facts for the card."""

    dtype: torch.dtype = torch.float32
    base: str | None = None
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainedAdapter:
    """What was trained beside a model: a source of all weights, and the names and modules of the model's family."""

    source: FragmentSource
    model: ModelConfig
    finetune: FinetuneConfig
    family: Family

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A whole tensor in fp32."""
        return self.source.read(name, "master", Box.whole(shape)).float()

    def pairs(self) -> dict[str, Pair]:
        """A and B of each of our linears that has an update."""
        declared, found = declare_parameters(self.model, self.finetune), dict[str, Pair]()
        for name, a in declared.items():
            if name.endswith("lora_a"):
                b = declared[f"{name.removesuffix('a')}b"]
                found[name[: -len(".lora_a")]] = (self.read(a.name, a.shape), self.read(b.name, b.shape))
        return found

    def trained_also(self) -> list[str]:
        """The model's own parameters that were trained too, a head for labels always."""
        patterns = FrozenNames((*self.finetune.lora.train_also, *LABEL_HEADS))
        return [name for name in parameter_shapes(self.model) if name in patterns]


def write_peft(folder: Path, adapter: TrainedAdapter, settings: PeftSettings) -> None:
    """Write the files into a folder that is there. Raises ConfigError for what PEFT has no form for."""
    config, tensors = adapter_files(adapter, settings.base)
    (folder / CONFIG).write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n", "utf-8")
    stored = {name: tensors[name].to(settings.dtype).contiguous().clone() for name in sorted(tensors)}
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(folder.stat().st_mode & 0o666)
    facts = {"Parameters": f"{sum(tensor.numel() for tensor in stored.values()):,}", **settings.facts}
    card = adapter_card(config, adapter.family.title, facts)
    (folder / "README.md").write_text(card, "utf-8")


def adapter_files(adapter: TrainedAdapter, base: str | None) -> Files:
    """What the files of a folder hold."""
    finetune, model = adapter.finetune, adapter.model
    match finetune.method:
        case "lora":
            return _lora_files(adapter, base)
        case "prompt":
            if model.family == "encoder" or model.predicts_labels:
                raise ConfigError(
                    "finetune.method = prompt: soft prompts are written for models that write text, not for an encoder "
                    "or a head for labels. `llmtrain generate` takes the run itself."
                )
            tokens = finetune.prompt.tokens
            prompt = adapter.read(PROMPT, (tokens, model.hidden_size))
            return prompt_settings(tokens, model, base), {PROMPT_FILE: prompt}
        case "adapter":
            raise ConfigError("finetune.method = adapter: PEFT has no bottlenecks in layers. Try --to adapterhub.")
        case "full":
            raise ConfigError("finetune.method = full: nothing was added to the model. Try --to hf.")


def _lora_files(adapter: TrainedAdapter, base: str | None) -> Files:
    model, lora = adapter.model, adapter.finetune.lora
    table, pairs = live_table(adapter.family, model), adapter.pairs()
    modules = lora_modules(table, model, pairs.keys())
    found = pairings(table, model)
    names = {module_of(pairing) for pairing in found}
    tensors, counts = dict[str, Tensor](), dict[str, int]()
    for stem, module in tensor_stems(modules).items():
        parts = [pairs.get(linear) for linear in module.linears]
        if module.expert is not None:
            parts = [pair and (pair[0][module.expert], pair[1][module.expert]) for pair in parts]
        tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = joined(parts, module)
        counts[module.name] = sum(part is not None for part in parts)
    several = {name: count for name, count in counts.items() if count > 1}
    parameters = [module.name for module in modules if module.num_experts]
    targeted = [module.name for module in modules if not module.num_experts]
    config = lora_settings(lora, model, base) | {
        "fan_in_fan_out": any(pairing.shape in (Shape.TRANSPOSED, Shape.FUSED) for pairing in found),
        "target_modules": short_names(targeted, names),
        "target_parameters": short_names(parameters, names) or None,
        "rank_pattern": _patterns({name: count * lora.rank for name, count in several.items()}, names),
        "alpha_pattern": _patterns({name: joined_alpha(lora, count) for name, count in several.items()}, names),
    }
    also = adapter.trained_also()
    whole = [pairing for pairing in found if set(pairing.ours) & set(also)]
    if not whole:
        return config, tensors
    saved = _saved_modules(whole, targeted, names)
    config["modules_to_save"] = short_names(saved, names, inside_words=True)
    if model.ties_head and WORD in also:
        config["ensure_weight_tying"] = True
    shapes = parameter_shapes(model)
    for pairing in found:
        if module_of(pairing) in saved:
            ours = [adapter.read(name, shapes[name]) for name in pairing.ours]
            ours = ours if pairing.expert is None else [tensor[pairing.expert] for tensor in ours]
            tensors[f"{PREFIX}{pairing.theirs}"] = to_theirs(pairing, ours, model)
            if config.get("ensure_weight_tying") and pairing.ours == (WORD,):
                tensors[f"{PREFIX}{head_name(table)}"] = tensors[f"{PREFIX}{pairing.theirs}"]
    return config, tensors


def _saved_modules(whole: list[Pairing], targeted: list[str], names: set[str]) -> set[str]:
    """The modules that are saved as a whole, as something of them was trained. Raises ConfigError where PEFT cannot."""
    saved = {module_of(pairing) for pairing in whole}
    stacked = {pairing.theirs for pairing in whole if pairing.shape is Shape.STACKED}
    parents = {name for name in saved if any(other.startswith(f"{name}.") for other in names)}
    for refused, why in (
        (stacked, "is one parameter of all experts, and PEFT saves modules"),
        (parents, "has a parameter of its own beside modules that were not trained, and PEFT saves it with them"),
        (saved & set(targeted), "was trained as a whole and has an update too"),
    ):
        if refused:
            raise ConfigError(f"finetune.lora.train_also: PEFT has no form: {min(refused)} {why}. Try --to hf.")
    return saved


def _patterns(values: Mapping[str, int | float], names: set[str]) -> dict[str, int | float]:
    """Values by endings of module names."""
    found = {}
    for value in set(values.values()):
        wanted = [name for name, own in values.items() if own == value]
        found |= dict.fromkeys(short_names(wanted, names), value)
    return dict(sorted(found.items()))
