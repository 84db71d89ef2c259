"""What lies beside the weights in a folder that runs begin from, when it is made of a trained model."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.compress.source import ModelSource
from llmtrain.data.token_roles import SETTINGS_NAME
from llmtrain.infer.hugging_face import start_config
from llmtrain.infer.tokenizer import FolderTokenizer, folder_tokenizer

KEPT_DATA = ("objective", "special_tokens")
"""Keys of the section data that say what a model was trained for."""


@dataclass(frozen=True)
class StartFiles:
    """Sections of the configuration, what the checkpoint's manifest says, and what writes the files beside it."""

    sections: Mapping[str, Any]
    about: dict[str, Any]
    write: Callable[[Path], object]


def start_files(source: ModelSource) -> StartFiles:
    """As an import has them: the tokenizer, its settings, and the objective. Raises DataError for damaged files."""
    tokenizer, checkpoint = source.tokenizer, source.checkpoint
    name = f"tokenizer{tokenizer.path.suffix}"
    if checkpoint is None:
        found = folder_tokenizer(source.path, source.model)
        if found.tokenizer is None:  # it was named
            found = FolderTokenizer(name, tokenizer.path.read_bytes(), tokenizer.roles, tokenizer, ())
        return StartFiles(start_config(source.model, found.tokenizer), found.about(), found.write)
    settings = checkpoint.path.absolute().parent.parent / SETTINGS_NAME

    def write(folder: Path) -> None:
        shutil.copyfile(tokenizer.path, folder / name)
        if settings.is_file():
            shutil.copyfile(settings, folder / SETTINGS_NAME)

    data = source.config["data"]
    kept = {key: data[key] for key in KEPT_DATA if data.get(key) is not None}
    said = {"data": checkpoint.about["data"]} if "data" in checkpoint.about else {}
    return StartFiles({"data": kept}, said, write)
