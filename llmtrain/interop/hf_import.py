"""Reading a Hugging Face folder: its configuration and its safetensors, checked against each other first."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmtrain.config.model import ModelConfig
from llmtrain.config.sizes import parameter_shapes
from llmtrain.errors import ConfigError, DataError
from llmtrain.interop.hf import FAMILIES, Family, model_config, parse_config
from llmtrain.interop.hf_export import INDEX, WEIGHTS
from llmtrain.interop.name_table import pairings, their_shape, to_ours

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_FLOATS = ("F64", "F32", "F16", "BF16")

# Constants that old versions of transformers saved beside the weights.
_NOT_WEIGHTS = re.compile(r"\.attn\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$")
_MAX_SHOWN = 10


class Box(Protocol):
    """A rectangular part of a tensor, as checkpoints describe it."""

    @property
    def offsets(self) -> tuple[int, ...]: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class HuggingFaceFolder:
    """A folder whose configuration fits its tensors; a source of weights like a checkpoint.

    `files` says for each tensor's full name in transformers which file holds it, and under which name.
    """

    path: Path
    family: Family
    model: ModelConfig
    files: dict[str, tuple[Path, str]]

    @property
    def tokenizer_path(self) -> Path | None:
        """The tokenizer in the folder, None where there is none that llmtrain reads."""
        return next((self.path / name for name in _TOKENIZERS if (self.path / name).is_file()), None)

    def names(self) -> list[str]:
        """Global names of the parameters."""
        return [name for pairing in pairings(self.family.table, self.model) for name in pairing.ours]

    def tensor(self, name: str) -> Tensor:
        """The whole tensor of a global name, in fp32."""
        pairing = next(found for found in pairings(self.family.table, self.model) if name in found.ours)
        path, stored_name = self.files[pairing.theirs]
        with safe_open(path, framework="pt") as file:
            stored = file.get_tensor(stored_name).float()
        return to_ours(pairing, stored, self.model)[pairing.ours.index(name)]

    def read(self, name: str, kind: str, box: Box) -> Tensor:
        """A box of a parameter, as a checkpoint gives it."""
        assert kind == "master", "a Hugging Face folder holds weights only"
        inside = tuple(slice(begin, begin + size) for begin, size in zip(box.offsets, box.shape, strict=True))
        return self.tensor(name)[inside].contiguous()

    def global_shape(self, name: str, kind: str) -> tuple[int, ...] | None:
        """Shape of a parameter, None for what is no weight of this model."""
        return parameter_shapes(self.model).get(name) if kind == "master" else None


def open_hf_folder(path: Path) -> HuggingFaceFolder:
    """Read configuration and tensor headers, no weights yet.

    Raises ConfigError where the folder or its family cannot be read by llmtrain, DataError where it is damaged: not
    JSON, not safetensors, or tensors that the configuration does not ask for.
    """
    config_path = path / "config.json"
    if not config_path.is_file():
        raise ConfigError(f"{path}: holds no config.json. Give a folder that `save_pretrained` wrote.")
    config = parse_config(_read_json(config_path), str(config_path))
    family, model = FAMILIES[config.model_type], model_config(config)
    headers = {}
    for file in _weight_files(path):
        for name, header in _headers(file).items():
            if _NOT_WEIGHTS.search(name):
                continue
            full = name if name.startswith((family.prefix, "lm_head.")) else family.prefix + name
            headers[full] = (file, name, header)
    if model.tie_embeddings:
        headers.pop("lm_head.weight", None)
    expected = {pairing.theirs: their_shape(pairing, model) for pairing in pairings(family.table, model)}
    problems = [f"{name}: the configuration does not ask for it" for name in sorted(headers.keys() - expected.keys())]
    for name, shape in expected.items():
        if name not in headers:
            problems.append(f"{name}: is missing")
            continue
        dtype, actual = headers[name][2]
        if actual != shape:
            problems.append(f"{name}: has the shape {list(actual)}, the configuration asks for {list(shape)}")
        elif dtype not in _FLOATS:
            problems.append(f"{name}: is stored as {dtype}; can import {', '.join(_FLOATS)}")
    if problems:
        listed = "\n  ".join(problems[:_MAX_SHOWN])
        raise DataError(f"{path}: config.json and weights do not fit ({len(problems)} problems):\n  {listed}")
    return HuggingFaceFolder(path, family, model, {name: found[:2] for name, found in headers.items()})


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder. Raises ConfigError where there are none, DataError for a bad index."""
    if (folder / INDEX).is_file():
        weight_map = _read_json(folder / INDEX).get("weight_map")
        names = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
        foreign = [name for name in names if not isinstance(name, str) or Path(name).name != name]
        if foreign or not names:
            raise DataError(f"{folder / INDEX}: weight_map must name files of the same folder; it names {foreign}")
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise DataError(f"{folder}: {', '.join(missing)} is missing; {INDEX} lists it. Copy the folder again.")
        return [folder / name for name in names]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if pickles := sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern)):
        raise ConfigError(
            f"{folder}: has its weights as {', '.join(pickles)}. Such files are pickles, which can run any code when "
            "they are read, so llmtrain reads none. Where you trust it, convert it: load it with transformers and "
            "`model.save_pretrained(FOLDER)`, which writes safetensors."
        )
    raise ConfigError(f"{folder}: holds neither {WEIGHTS} nor {INDEX}.")


def _headers(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each tensor in a file."""
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (safe_open is no mapping)
            return {name: (found.get_dtype(), tuple(found.get_shape())) for name, found in slices.items()}
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file}: is no valid safetensors file: {error}. Copy it again.") from error


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is no valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: must be a JSON object")
    return content
