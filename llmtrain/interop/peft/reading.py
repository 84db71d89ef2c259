"""Reading a folder that PEFT wrote, for a model that is known: its settings and its tensors, checked against both."""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from llmtrain.config.finetune import FinetuneConfig
from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import declare_parameters, iter_linears, target_names
from llmtrain.errors import ConfigError, DataError
from llmtrain.interop.folder_files import Header, file_headers, read_json
from llmtrain.interop.hf import Family
from llmtrain.interop.name_table import Pairing, Shape, pairings, their_shape, to_ours
from llmtrain.interop.peft.modules import PREFIX, LoraModule, live_table, lora_modules, parted, tensor_stems
from llmtrain.interop.peft.settings import CONFIG, WEIGHTS, require_readable, shown
from llmtrain.interop.peft.writing import PROMPT, PROMPT_FILE

_PICKLE = "adapter_model.bin"
_FACTOR = re.compile(r"(?P<stem>.+)\.lora_(?P<which>[AB])(\.default)?\.weight$")
_MAX_SHOWN = 10


@dataclass(frozen=True)
class PeftFolder:
    """What a folder adds to its base: the settings of a finetuning, and tensors in fp32 by our names, those of the
    base's own parameters among them that the adapter has trained as a whole."""

    finetune: FinetuneConfig
    tensors: Mapping[str, Tensor]
    notes: list[str] = field(default_factory=list)


def open_peft_folder(path: Path, family: Family, model: ModelConfig) -> PeftFolder:
    """Read an adapter for a model of a family.

    Raises ConfigError where the folder is none, or its kind of adapter cannot be read; DataError where it is damaged,
    or was trained on another base.
    """
    settings = read_settings(path)
    headers = file_headers(_weights(path))
    if settings["peft_type"] == "PROMPT_TUNING":
        return _prompt(path, settings, headers, model)
    return _Lora(path, settings, headers, family, model).folder()


def read_settings(path: Path) -> dict[str, Any]:
    """The content of adapter_config.json, of a kind that can be read."""
    config = path / CONFIG
    if not config.is_file():
        raise ConfigError(f"{path}: holds no {CONFIG}. Give a folder that PEFT's `save_pretrained` wrote.")
    settings = read_json(config)
    require_readable(settings, str(config))
    return settings


def _weights(path: Path) -> Path:
    if (path / WEIGHTS).is_file():
        return path / WEIGHTS
    if (path / _PICKLE).is_file():
        raise ConfigError(
            f"{path / _PICKLE}: is a pickle, which can run any code when it is read, so llmtrain reads none. Where you "
            "trust it, load it with PEFT and `save_pretrained` it, which writes safetensors."
        )
    raise DataError(f"{path}: holds no {WEIGHTS}. Copy the folder again.")


def load(header: Header) -> Tensor:
    """A stored tensor in fp32."""
    with safe_open(header.file, framework="pt") as file:
        return file.get_tensor(header.name).float()


def _prompt(path: Path, settings: Mapping[str, Any], headers: Mapping[str, Header], model: ModelConfig) -> PeftFolder:
    tokens, header = settings.get("num_virtual_tokens"), headers.get(PROMPT_FILE)
    if settings.get("num_transformer_submodules") not in (None, 1):
        raise ConfigError(
            f"{path / CONFIG}: num_transformer_submodules = 2: a prompt of the decoder's own is not read."
        )
    if header is None:
        raise DataError(f"{path / WEIGHTS}: has no tensor {PROMPT_FILE}. Copy the folder again.")
    if header.shape != (tokens, model.hidden_size):
        raise DataError(
            f"{path / WEIGHTS}: {PROMPT_FILE} has the shape {list(header.shape)}, and {CONFIG} and this base ask for "
            f"{[tokens, model.hidden_size]}. It is a prompt of another base, or damaged."
        )
    finetune = FinetuneConfig.model_validate({"method": "prompt", "prompt": {"tokens": tokens}})
    return PeftFolder(finetune, {PROMPT: load(header)})


@dataclass(frozen=True)
class _Lora:
    """An adapter with low-rank updates, while it is read."""

    path: Path
    settings: Mapping[str, Any]
    headers: Mapping[str, Header]
    family: Family
    model: ModelConfig

    def folder(self) -> PeftFolder:
        rank, alpha = self._number("r", 1), self._number("lora_alpha", 0)
        factors, rest = self._sorted_headers()
        modules = self._modules(factors)
        self._require_fit(factors, modules)
        tensors: dict[str, Tensor] = {}
        parts = dict[str, dict[int | None, tuple[Tensor, Tensor, float]]]()
        for stem, found in factors.items():
            module, (own_rank, scale) = modules[stem], self._rank_and_scale(modules[stem], found["A"])
            blocks = own_rank == rank * len(module.linears)
            pairs = parted(load(found["A"]), load(found["B"]), module, blocks)
            for linear, (a, b) in zip(module.linears, pairs, strict=True):
                parts.setdefault(linear, {})[module.expert] = (a, b, scale)
        lora = self._lora(parts, rank, alpha)
        finetune = FinetuneConfig.model_validate({"method": "lora", "lora": lora})
        shapes = declare_parameters(self.model, finetune)
        for linear, found in parts.items():
            name = f"{linear}.lora_a" if f"{linear}.lora_a" in shapes else f"{linear}_lora_a"
            a, b = _filled(found, shapes[name].shape, shapes[f"{name[:-1]}b"].shape, finetune.lora.scale)
            tensors |= {name: a, f"{name[:-1]}b": b}
        tensors |= self._saved_whole(rest)
        return PeftFolder(finetune, tensors)

    def _number(self, key: str, least: int) -> float:
        value = self.settings.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value < math.inf or not value:
            raise DataError(
                f"{self.path / CONFIG}: {key} = {shown(value)}: must be a number greater than 0. PEFT writes one."
            )
        return value

    def _sorted_headers(self) -> tuple[dict[str, dict[str, Header]], dict[str, Header]]:
        """A and B by the stem of their names, and the tensors that are saved as a whole."""
        factors, rest = dict[str, dict[str, Header]](), dict[str, Header]()
        for name, header in self.headers.items():
            match = _FACTOR.match(name)
            if match is None:
                rest[name] = header
            else:
                factors.setdefault(match["stem"], {})[match["which"]] = header
        for stem, found in factors.items():
            for which in "AB":
                if which not in found:
                    raise DataError(f"{self.path / WEIGHTS}: {stem} has no lora_{which}. Copy the folder again.")
        if not factors:
            raise DataError(f"{self.path / WEIGHTS}: has no lora_A and lora_B. Copy the folder again.")
        return factors, rest

    def _modules(self, stems: Collection[str]) -> dict[str, LoraModule]:
        """The module of each stem."""
        linears = [linear for linear, _ in iter_linears(self.model)]
        every = lora_modules(live_table(self.family, self.model), self.model, linears)
        # Which parameter of experts is wrapped how often depends on which of them have an update.
        asked = self.settings.get("target_parameters") or ()
        targeted = [
            module
            for module in every
            if not module.num_experts or any(module.name == end or module.name.endswith(f".{end}") for end in asked)
        ]
        known = tensor_stems(targeted)
        unknown = [stem for stem in stems if stem not in known]
        if unknown:
            stem = unknown[0]
            near = get_close_matches(stem, known, 1, 0.0)[0].removeprefix(PREFIX)
            raise DataError(
                f"{self.path / WEIGHTS}: {stem.removeprefix(PREFIX)} is no linear in the layers of this "
                f"{self.family.title} that can have an update ({len(unknown)} such names). The nearest is {near}. It "
                "is an adapter of another base, or of modules that llmtrain adds none to."
            )
        return {stem: known[stem] for stem in stems}

    def _require_fit(self, factors: Mapping[str, Mapping[str, Header]], modules: Mapping[str, LoraModule]) -> None:
        problems = []
        for stem, found in factors.items():
            module, (a, b) = modules[stem], (found["A"].shape, found["B"].shape)
            if len(a) != 2 or len(b) != 2 or 0 in (*a, *b):
                problems.append(f"{stem}: A is {list(a)} and B is {list(b)}, which are no matrices with a rank")
            elif (a[1], b[0]) != (module.size_in, module.outputs):
                told = f"takes {a[1]} and gives {b[0]}, the base's takes {module.size_in} and gives {module.outputs}"
                problems.append(f"{stem}: {told}")
            elif a[0] != b[1] or a[0] % (module.num_experts or 1):
                problems.append(f"{stem}: A has the rank {a[0]} and B {b[1]}")
        if problems:
            listed = "\n  ".join(problems[:_MAX_SHOWN])
            raise DataError(
                f"{self.path / WEIGHTS}: does not fit the base ({len(problems)} problems): it is an adapter of another "
                f"one, or damaged.\n  {listed}"
            )

    def _rank_and_scale(self, module: LoraModule, a: Header) -> tuple[int, float]:
        """The rank that a module has in the file, which must be what the settings say, and the factor of B A."""
        rank = a.shape[0] // (module.num_experts or 1)
        told = _of_pattern(self.settings.get("rank_pattern"), module.name, self.settings["r"])
        if rank != told:
            raise DataError(
                f"{self.path / WEIGHTS}: {module.name} has the rank {rank}, and {CONFIG} says {shown(told)}. Copy the "
                "folder again."
            )
        alpha = _of_pattern(self.settings.get("alpha_pattern"), module.name, self.settings["lora_alpha"])
        return rank, alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)

    def _lora(
        self, parts: Mapping[str, Mapping[int | None, tuple[Tensor, Tensor, float]]], rank: float, alpha: float
    ) -> dict[str, Any]:
        """The section finetune.lora: the file's own rank and alpha where all modules have these, else the largest rank
        and a factor of 1 in each of it."""
        ranks = {a.shape[-2] for found in parts.values() for a, _, _ in found.values()}
        scales = {scale for found in parts.values() for *_, scale in found.values()}
        rslora = bool(self.settings.get("use_rslora"))
        if ranks != {rank} or any(not math.isclose(s, alpha / (math.sqrt(rank) if rslora else rank)) for s in scales):
            rank, rslora = max(ranks), False
            alpha = max(scales) * rank
        return {
            "rank": int(rank),
            "alpha": float(alpha),
            "rslora": rslora,
            "dropout": float(self.settings.get("lora_dropout") or 0.0),
            "targets": targets_of(parts, self.model),
            "train_also": sorted({name for pairing in self._whole_pairings() for name in pairing.ours}),
        }

    def _whole_pairings(self) -> Iterator[Pairing]:
        for pairing in pairings(live_table(self.family, self.model), self.model):
            if f"{PREFIX}{pairing.theirs}" in self.headers:
                yield pairing

    def _saved_whole(self, rest: Mapping[str, Header]) -> dict[str, Tensor]:
        """The base's own parameters that the adapter has trained."""
        tensors, left = dict[str, Tensor](), dict(rest)
        for pairing in self._whole_pairings():
            header = left.pop(f"{PREFIX}{pairing.theirs}")
            wanted = their_shape(pairing, self.model)
            if header.shape != wanted or pairing.expert is not None or pairing.shape is Shape.STACKED:
                raise DataError(
                    f"{self.path / WEIGHTS}: {header.name} has the shape {list(header.shape)}, and the base's has "
                    f"{list(wanted)}. It is an adapter of another base, or of one whose vocabulary had grown."
                )
            tensors |= dict(zip(pairing.ours, to_ours(pairing, load(header), self.model), strict=True))
        for name in list(left):
            # A head that is tied is the embedding, and is saved with it.
            if self.model.ties_head and name.endswith(("lm_head.weight", "decoder.weight", "embed_tokens.weight")):
                del left[name]
        if left:
            name = sorted(left)[0]
            known = [
                f"{PREFIX}{pairing.theirs}" for pairing in pairings(live_table(self.family, self.model), self.model)
            ]
            near = get_close_matches(name, known, 1, 0.0)[0]
            raise DataError(
                f"{self.path / WEIGHTS}: {name} is no tensor of this {self.family.title}. The nearest is {near}."
            )
        return tensors


def _of_pattern(patterns: Mapping[str, Any] | None, name: str, usual: Any) -> Any:
    """The value of the first pattern that fits a module's name, as PEFT looks for it: whole words at its end, or with ^
    all of it. `require_readable` has seen to it that they are plain names."""
    for pattern, value in (patterns or {}).items():
        ending = pattern.replace("\\", "")
        if name == ending.lstrip("^") or (not ending.startswith("^") and name.endswith(f".{ending}")):
            return value
    return usual


def _filled(
    found: Mapping[int | None, tuple[Tensor, Tensor, float]],
    a_shape: tuple[int, ...],
    b_shape: tuple[int, ...],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """A and B of one of our linears: lower ranks are filled up with zeros, and other factors go into B."""
    some = next(iter(found.values()))[0]
    a, b = some.new_zeros(a_shape), some.new_zeros(b_shape)
    for expert, (own_a, own_b, own_scale) in found.items():
        rank = own_a.shape[-2]
        factor = 1.0 if math.isclose(own_scale, scale) else own_scale / scale
        into_a, into_b = (a, b) if expert is None else (a[expert], b[expert])
        into_a[..., :rank, :] = own_a
        into_b[..., :rank] = own_b * factor
    return a, b


def targets_of(linears: Collection[str], model: ModelConfig) -> list[str]:
    """finetune.lora.targets that mean these linears and no others: short names where all that one means are there."""
    meant: dict[str, list[str]] = {}
    for linear, _ in iter_linears(model):
        for name in target_names(linear):
            meant.setdefault(name, []).append(linear)
    whole = {name for name, those in meant.items() if set(those) <= set(linears)}
    found = {next((name for name in target_names(linear) if name in whole), linear) for linear in linears}
    return sorted(found)
