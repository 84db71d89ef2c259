"""A PEFT folder and the base that it goes with, read as one model: nothing is imported, and no weight is copied."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from llmtrain.config.finetune import FinetuneConfig
from llmtrain.config.model import ModelConfig
from llmtrain.errors import ConfigError
from llmtrain.interop.hf import Family, family_for
from llmtrain.interop.hf_import import HuggingFaceFolder
from llmtrain.interop.peft.reading import open_peft_folder, read_settings
from llmtrain.interop.peft.settings import CONFIG
from llmtrain.values.fragment import Box, FragmentSource


@dataclass(frozen=True)
class AdaptedWeights:
    """A source of fragments: the base's weights, and what an adapter has added to them or has in their place."""

    base: FragmentSource
    tensors: Mapping[str, Tensor]

    def read(self, name: str, kind: str, box: Box) -> Tensor:
        tensor = self.tensors.get(name) if kind == "master" else None
        if tensor is None:
            return self.base.read(name, kind, box)
        return tensor[box.slices_in(Box.whole(tensor.shape))].contiguous()

    def global_shape(self, name: str, kind: str) -> tuple[int, ...] | None:
        if name in self.tensors and kind == "master":
            return tuple(self.tensors[name].shape)
        return self.base.global_shape(name, kind)


def base_of_adapter(path: Path, given: Path | None) -> Path:
    """The folder of an adapter's base: what was given, else what its settings name, from here or from the folder.

    Raises ConfigError where they name none, or what is not here.
    """
    named = read_settings(path).get("base_model_name_or_path")
    what = "--base FOLDER: a Hugging Face folder, an import or a run"
    if given is not None:
        found = given  # who opens it says what is wrong with it
    elif not isinstance(named, str) or not named:
        raise ConfigError(f"{path}: is an adapter, and its {CONFIG} names no base. Give {what}.")
    else:
        places = [place for place in (Path(named), path / named) if place.is_dir()]
        if not places:
            raise ConfigError(
                f"{path}: is an adapter of {named!r:.200}, and there is no such folder here. llmtrain fetches no "
                f"models: download it, and give {what}."
            )
        found = places[0]
    if (found / CONFIG).is_file():
        raise ConfigError(f"{found}: is an adapter itself, and cannot be the base of {path}. Give {what}.")
    return found


def adapted(
    path: Path, base: Path, model: ModelConfig, weights: FragmentSource, finetune: FinetuneConfig | None
) -> tuple[AdaptedWeights, FinetuneConfig]:
    """The weights of a base together with those of an adapter, and what the adapter adds. `finetune` is what the base
    was trained with.

    Raises as `open_peft_folder` does, and ConfigError for a base that has something beside its weights already.
    """
    if finetune is not None and finetune.method != "full":
        raise ConfigError(
            f"{base}: is the base of {path}, and has a {finetune.method} beside its weights itself. Merge it first "
            "(`llmtrain export RUN OUT --to hf`), and give that folder with --base."
        )
    family: Family = weights.family if isinstance(weights, HuggingFaceFolder) else family_for(model, None)
    found = open_peft_folder(path, family, model)
    return AdaptedWeights(weights, found.tensors), found.finetune
