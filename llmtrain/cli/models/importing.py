"""`llmtrain import`: Hugging Face folders, PEFT folders and GGUF files as checkpoints."""

from pathlib import Path
from typing import Annotated

import typer

from llmtrain.cli.models.options import JsonOption, print_result, require_unused
from llmtrain.errors import ConfigError


def import_(
    source: Annotated[Path, typer.Argument(help="A Hugging Face folder (config.json, safetensors), or FILE.gguf.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist or be empty.")],
    base: Annotated[
        Path | None, typer.Option(help="Of an adapter's folder: the Hugging Face folder that it goes with.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Read a Hugging Face folder, a PEFT folder and its base, or a GGUF file (F32, F16, BF16, Q8_0) as a checkpoint of
    step 0, with its configuration and tokenizer beside it.

    Train from it with `base: OUT/config.yaml` and `checkpoint.resume=OUT`. Weights are read and written some at a time.
    """
    require_unused(out)
    from llmtrain.config.parameters import num_parameters
    from llmtrain.interop.installation import CONFIGURATIONS, require_transformers
    from llmtrain.runs.file_system import require_place

    require_place(out)
    require_transformers(CONFIGURATIONS)
    from llmtrain.infer.adapters import import_adapter
    from llmtrain.infer.gguf import gguf_file, import_gguf
    from llmtrain.infer.hugging_face import import_folder

    if (source / "adapter_config.json").is_file():
        imported = import_adapter(source, base, out)
    elif base is not None:
        raise ConfigError(f"--base: goes with an adapter's folder, and {source} holds no adapter_config.json.")
    elif (file := gguf_file(source)) is not None:
        imported = import_gguf(file, out)
    else:
        imported = import_folder(source, out)
    folder, found = imported.folder, imported.tokenizer
    print_result(
        {
            "folder": str(out),
            "checkpoint": str(imported.checkpoint),
            "config": str(out / "config.yaml"),
            "tokenizer": None if found.name is None else str(out / found.name),
            "family": folder.title,
            "parameters": num_parameters(folder.model),
            "notes": [*folder.notes, *found.notes],
        },
        as_json,
    )
