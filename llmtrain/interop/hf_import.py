"""Reading a Hugging Face folder: its configuration and its safetensors, checked against each other first."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import iter_linears, parameter_shapes
from llmtrain.errors import ConfigError, DataError
from llmtrain.interop.compressed.form import KEY, read_form
from llmtrain.interop.compressed.tensors import QUANTIZED, WEIGHT, StoredNumbers, gathered
from llmtrain.interop.folder_files import Header, all_headers, equal_tensors, read_json, require_as_exported
from llmtrain.interop.hf import FAMILIES, Family, model_config, not_taken_over, parse_config
from llmtrain.interop.name_table import Pairing, Table, head_name, is_transposed, pairings, their_shape, to_ours
from llmtrain.values.fragment import Box
from llmtrain.values.quantization import Quantized

_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_FLOATS = ("F64", "F32", "F16", "BF16")
_READ = (*_FLOATS, QUANTIZED)

# Constants that old versions of transformers saved beside the weights.
_NOT_WEIGHTS = re.compile(r"\.attn\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$|\.embeddings\.position_ids$")
# Names that norms had in the first conversions from TensorFlow.
_OLD_NAMES = {".LayerNorm.gamma": ".LayerNorm.weight", ".LayerNorm.beta": ".LayerNorm.bias"}
_MAX_SHOWN = 10


@dataclass(frozen=True)
class HuggingFaceFolder:
    """A folder whose configuration fits its tensors; a source of weights like a checkpoint.

    `files` says for each tensor's full name in transformers which file holds it, and under which name. `notes` tell
    what of the folder is not taken over, and what an own export did not have when it was written: `changed`.
    """

    path: Path
    family: Family
    model: ModelConfig
    table: Table
    files: dict[str, tuple[Path, str]]
    notes: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    numbers: StoredNumbers | None = None
    """The quantized matrices. `tensor` and all that gives tensors dequantizes them."""

    @cached_property
    def quantized(self) -> frozenset[str]:
        """Our names of the weights that are quantized, of stacked experts where all are."""
        if self.numbers is None:
            return frozenset()
        parts = self.numbers.parts
        return frozenset(
            name for name, found in self._by_name.items() if all(self.files[each.theirs][1] in parts for each in found)
        )

    @property
    def rounded_inputs(self) -> frozenset[str]:
        """Our linears that the folder says round what goes into them."""
        if self.numbers is None or not self.numbers.form.rounds_inputs:
            return frozenset()
        return frozenset(name.removesuffix(WEIGHT) for name in self.quantized)

    def whole_numbers(self, name: str, expert: int | None = None) -> Quantized:
        """One of the weights in `quantized`, of stacked experts that of one, as it is stored."""
        assert self.numbers is not None
        pairing = self._by_name[name][expert or 0]
        numbers, scale = self.numbers.read(self.files[pairing.theirs][1])
        at = pairing.ours.index(name)
        # Scales lie as the outputs do that they are of.
        return Quantized(to_ours(pairing, numbers, self.model)[at], to_ours(pairing, scale, self.model)[at])

    @property
    def title(self) -> str:
        return self.family.title

    @property
    def tokenizer_path(self) -> Path | None:
        """The tokenizer in the folder, None where there is none that llmtrain reads."""
        return next((self.path / name for name in _TOKENIZERS if (self.path / name).is_file()), None)

    @cached_property
    def _by_name(self) -> dict[str, list[Pairing]]:
        found: dict[str, list[Pairing]] = {}
        for pairing in pairings(self.table, self.model):
            for name in pairing.ours:
                found.setdefault(name, []).append(pairing)
        return found

    def iter_tensors(self) -> Iterator[tuple[str, int | None, Tensor]]:
        """Every parameter in fp32, one of the folder's tensors at a time: (global name, expert, tensor).

        Stacked experts come one by one; otherwise the expert is None.
        """
        for pairing in pairings(self.table, self.model):
            for name, tensor in zip(pairing.ours, self._ours(pairing), strict=True):
                yield name, pairing.expert, tensor

    def tensor(self, name: str, expert: int | None = None) -> Tensor:
        """The whole tensor of a global name, in fp32, or that of one expert."""
        found = self._by_name[name]
        if found[0].expert is None:
            whole = self._ours(found[0])[found[0].ours.index(name)]
            return whole if expert is None else whole[expert]
        if expert is not None:
            return self._ours(found[expert])[0]
        return torch.stack([self._ours(pairing)[0] for pairing in found])

    def _ours(self, pairing: Pairing) -> list[Tensor]:
        path, stored_name = self.files[pairing.theirs]
        if self.numbers is not None and stored_name in self.numbers.parts:
            return to_ours(pairing, self.numbers.weight(stored_name), self.model)
        with safe_open(path, framework="pt") as file:
            stored = file.get_tensor(stored_name).float()
        return to_ours(pairing, stored, self.model)

    def read(self, name: str, kind: str, box: Box) -> Tensor:
        """A box of a parameter, as a checkpoint gives it."""
        assert kind == "master", "a Hugging Face folder holds weights only"
        inside = tuple(slice(begin, begin + size) for begin, size in zip(box.offsets, box.shape, strict=True))
        if self._by_name[name][0].expert is None:
            return self.tensor(name)[inside].contiguous()
        experts = range(inside[0].start, inside[0].stop)
        return torch.stack([self.tensor(name, expert)[inside[1:]] for expert in experts])

    def global_shape(self, name: str, kind: str) -> tuple[int, ...] | None:
        """Shape of a parameter, None for what is no weight of this model."""
        return parameter_shapes(self.model).get(name) if kind == "master" else None


def open_hf_folder(path: Path) -> HuggingFaceFolder:
    """Read configuration and tensor headers; of the weights only those that may be there twice.

    Raises ConfigError where the folder or its family cannot be read by llmtrain, DataError where it is damaged: not
    JSON, not safetensors, or tensors that the configuration does not ask for.
    """
    config_path = path / "config.json"
    if not config_path.is_file():
        raise ConfigError(f"{path}: holds no config.json. Give a folder that `save_pretrained` wrote.")
    changed = require_as_exported(path)
    content = read_json(config_path)
    config = parse_config(content, str(config_path))
    family, model = FAMILIES[config.model_type], model_config(config)
    stored, numbers = all_headers(path), None
    if content.get(KEY) is not None:
        form = read_form(content[KEY], str(config_path), is_transposed(family.tables[0]))
        stored, numbers = gathered(path, stored, form)
    headers, notes = _named_headers(stored, family, model)
    if numbers is not None:
        notes.insert(0, f"{numbers.form.told}, dequantized when they are read")
    model = _with_head_as_stored(model, family, headers, notes)
    # Of several forms of the same weights, the one that most of the files' tensors are named after.
    tables = family.tables_for(model)
    table = max(tables, key=lambda table: sum(pairing.theirs in headers for pairing in pairings(table, model)))
    _settle_copies(path, pairings(table, model), headers)
    expected = {pairing.theirs: their_shape(pairing, model) for pairing in pairings(table, model)}
    _require_fit(path, expected, headers)
    files = {name: (header.file, header.name) for name, header in headers.items()}
    notes = [*changed, *notes, *not_taken_over(content, config, model)]
    folder = HuggingFaceFolder(path, family, model, table, files, notes, changed, numbers)
    _require_rounding_of_linears(folder)
    return folder


def _named_headers(
    stored: Mapping[str, Header], family: Family, model: ModelConfig
) -> tuple[dict[str, Header], list[str]]:
    """Headers by their full names in transformers, and what is told of those that are left out."""
    headers, left_out = {}, []
    for name, header in stored.items():
        if _NOT_WEIGHTS.search(name):
            continue
        full = (
            name
            if name.startswith((family.prefix, *family.heads, *family.label_heads.heads()))
            else family.prefix + name
        )
        for old, new in _OLD_NAMES.items():
            full = full.removesuffix(old) + new if full.endswith(old) else full
        if family.is_left_out(full, model):
            left_out.append(full)
        else:
            headers[full] = header
    return headers, [f"{name}: not part of this model, left out" for name in sorted(left_out)]


def _with_head_as_stored(
    model: ModelConfig, family: Family, headers: dict[str, Header], notes: list[str]
) -> ModelConfig:
    """As transformers has it: where a tied head is in the files too and differs, it is not tied."""
    table = family.tables_for(model)[0]
    head = head_name(table)
    if not model.ties_head or head not in headers:
        return model
    if headers[head].dtype == QUANTIZED:
        raise DataError(
            f"{headers[head].file}: {head}: is quantized, and config.json says that it is the embedding too."
        )
    word = next(pairing for pairing in pairings(table, model) if pairing.ours == ("embeddings.word.weight",))
    embedding = next((name for name in (word.theirs, *word.copies) if name in headers), None)
    if embedding is None or equal_tensors(headers[embedding], headers[head]):
        del headers[head]
        return model
    notes.append(f"{head} differs from {embedding}, so it is not tied, although config.json says so")
    return model.with_keys({"tie_embeddings": False})


def _settle_copies(path: Path, found: tuple[Pairing, ...], headers: dict[str, Header]) -> None:
    """Leave one of equal tensors under the name that the table has. Raises DataError where they are not equal."""
    for pairing in found:
        present = [name for name in (pairing.theirs, *pairing.copies) if name in headers]
        for name in present[1:]:
            if not equal_tensors(headers[present[0]], headers[name]):
                raise DataError(
                    f"{path}: {present[0]} and {name} differ. llmtrain has one tensor for both, so it cannot hold "
                    "such a model."
                )
        kept = [headers.pop(name) for name in present]
        if kept:
            headers[pairing.theirs] = kept[0]


def _require_fit(path: Path, expected: Mapping[str, tuple[int, ...]], headers: Mapping[str, Header]) -> None:
    """Raise DataError where files and configuration are of different models."""
    problems = [f"{name}: the configuration does not ask for it" for name in sorted(headers.keys() - expected.keys())]
    for name, shape in expected.items():
        if name not in headers:
            problems.append(f"{name}: is missing")
        elif headers[name].shape != shape:
            problems.append(
                f"{name}: has the shape {list(headers[name].shape)}, the configuration asks for {list(shape)}"
            )
        elif headers[name].dtype not in _READ:
            problems.append(f"{name}: is stored as {headers[name].dtype}; can import {', '.join(_FLOATS)}")
    if problems:
        listed = "\n  ".join(problems[:_MAX_SHOWN])
        raise DataError(f"{path}: config.json and weights do not fit ({len(problems)} problems):\n  {listed}")


def _require_rounding_of_linears(folder: HuggingFaceFolder) -> None:
    """Raise ConfigError where what goes into other matrices than linears of layers is rounded: the head is no module
    here, transformers stacks experts and rounds nothing there, and other numbers would come out in silence."""
    numbers = folder.numbers
    if numbers is None or not numbers.form.rounds_inputs:
        return
    # Where matrices lie as [in, out], the class in transformers has Conv1D modules, whose inputs are not rounded.
    linears = {weight.name for _, weight in iter_linears(folder.model) if not weight.expert}
    others = [
        pairing.theirs
        for pairing in pairings(folder.table, folder.model)
        if folder.files[pairing.theirs][1] in numbers.parts
        and (numbers.form.transposed or not linears.issuperset(pairing.ours))
    ]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise ConfigError(
            f"{folder.path}: quantization_config rounds what goes into {others[0]}{more} (input_activations). Of "
            "a folder inputs of linears in layers are rounded, not of Conv1D modules, experts, routers and heads. "
            "Quantize the model again with those in quantization_config.ignore, or without input_activations."
        )
