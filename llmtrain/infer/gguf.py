"""Between runs and GGUF files: a checkpoint exported as one, and one imported as a run folder or used as it is."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llmtrain.checkpoint.reader import CheckpointReader
from llmtrain.checkpoint.saved_run import saved_data
from llmtrain.data.source_reader import StreamConfig
from llmtrain.data.stream import SampleStream, load_sources
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.errors import ConfigError
from llmtrain.infer.hugging_face import (
    Imported,
    merging_facts,
    open_trained,
    trained_weights,
    write_imported,
)
from llmtrain.infer.model import GGUF_SUFFIX, FoundModel, files_identity
from llmtrain.infer.tokenizer import FolderTokenizer, folder_tokenizer
from llmtrain.interop.folder_files import require_as_exported
from llmtrain.interop.gguf.export import MEASURED, MEASURED_LENGTH, GgufExport, GgufSettings, write_gguf
from llmtrain.interop.gguf.importing import GgufFile, open_gguf
from llmtrain.interop.gguf.tokenizer_files import write_tokenizer_files
from llmtrain.interop.hf_export import ExportSettings

_logger = logging.getLogger(__name__)


def export_gguf(
    source: Path, out: Path, tokenizer: Path | None, settings: GgufSettings
) -> tuple[CheckpointReader, GgufExport]:
    """Write the checkpoint that a path means as a GGUF file, and prove it. Validation data of its run is filled in.

    Raises as `open_trained`, `trained_weights` and `write_gguf` do.
    """
    checkpoint, trained = open_trained(source, tokenizer)
    weights = trained_weights(checkpoint, trained.config)
    trained = trained.with_facts(merging_facts(checkpoint, trained.config, ExportSettings()))
    held_out = _validation_windows(saved_data(checkpoint), min(MEASURED_LENGTH, trained.config.max_seq_len))
    return checkpoint, write_gguf(out, trained, weights, replace(settings, held_out=held_out))


def _validation_windows(data: Mapping[str, Any], length: int) -> list[Sequence[int]]:
    """The first windows of a run's validation data, each as long; none where it is not there (any more)."""
    paths = [str(source.get("path")) for source in data.get("valid") or () if isinstance(source, dict)]
    if not paths or not all(Path(path, "manifest.json").is_file() for path in paths):
        return []
    stream = SampleStream(load_sources(paths, [1] * len(paths)), StreamConfig(0, length, once=True))
    samples = (stream.sample(number) for number in range(min(MEASURED, int(stream.length_once))))
    return [sample.tokens[:length].tolist() for sample in samples]


def gguf_file(source: Path) -> Path | None:
    """The GGUF file that a path means: itself (`.gguf`), or the only one of a folder that is none of Hugging Face's.

    None: there is none. Raises ConfigError where a folder has several, DataError where an own export's is not what was
    written.
    """
    if source.is_file():
        return source if source.suffix == GGUF_SUFFIX else None
    found = [] if (source / "config.json").is_file() else sorted(source.glob(f"*{GGUF_SUFFIX}"))
    if len(found) > 1:
        raise ConfigError(f"{source}: holds {len(found)} GGUF files. Name one of them, such as {found[0]}.")
    if found:
        require_as_exported(source)
    return found[0] if found else None


def find_gguf_model(file: Path) -> FoundModel:
    """The model of a GGUF file and the tokenizer in it; its weights are dequantized when they are read.

    Raises as `open_gguf` and `write_tokenizer_files`.
    """
    opened = open_gguf(file)
    with _tokenizer_of(opened) as (folder, found):
        for note in found.notes:
            _logger.warning("%s: %s", file, note)
        tokenizer = None
        if found.tokenizer is not None and found.name is not None:
            tokenizer = load_tokenizer(folder / found.name, found.roles)
    return FoundModel(opened.model, opened, own_tokenizer=tokenizer, identity=files_identity([file]))


def import_gguf(source: Path, out: Path) -> Imported:
    """Read a GGUF file and write OUT. Weights are read and written some at a time."""
    file = open_gguf(source)
    with _tokenizer_of(file) as (_, found):
        pass
    return Imported(file, found, write_imported(file, found, out))


@contextmanager
def _tokenizer_of(file: GgufFile) -> Iterator[tuple[Path, FolderTokenizer]]:
    """A folder with the files of a tokenizer that is in a GGUF file, and what it holds."""
    with TemporaryDirectory(prefix="llmtrain-") as place:
        notes = write_tokenizer_files(Path(place), file.header.metadata, file.header.path)
        found = folder_tokenizer(Path(place), file.model)
        yield Path(place), replace(found, notes=(*notes, *found.notes))
