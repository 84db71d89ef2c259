"""Writing tensors as safetensors of bounded size, with the index that transformers reads."""

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llmtrain.errors import ExportError
from llmtrain.interop.folder_files import INDEX, WEIGHTS


def write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int) -> None:
    """Write model.safetensors, or shards and their index where the tensors take more than `max_shard_bytes`.

    At most one shard is in memory; a larger tensor has a shard of its own. Raises ExportError where the disk is full.
    """
    shards: list[dict[str, int]] = []
    held: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if held and sum(other.nbytes for other in held.values()) + tensor.nbytes > max_shard_bytes:
            shards.append(_write_shard(folder, len(shards), held))
            held = {}
        # A slice would keep, and the library would refuse, the memory around it.
        held[name] = tensor.contiguous() if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
    shards.append(_write_shard(folder, len(shards), held))
    if len(shards) == 1:
        _shard_path(folder, 0).rename(folder / WEIGHTS)
        return
    weight_map = {}
    for number, sizes in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        _shard_path(folder, number).rename(folder / file)
        weight_map |= dict.fromkeys(sizes, file)
    total_size = sum(sum(sizes.values()) for sizes in shards)
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _shard_path(folder: Path, number: int) -> Path:
    """The place of a shard until their number is known."""
    return folder / f"shard-{number}.safetensors"


def _write_shard(folder: Path, number: int, tensors: dict[str, Tensor]) -> dict[str, int]:
    """Write one shard; returns the bytes of each tensor."""
    path = _shard_path(folder, number)
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # what the disk refuses, which the library wraps
        raise ExportError(f"{path}: the export could not be written: {error}. Nothing is left of it.") from None
    # The library lets only the owner read what it writes; the other files follow the user's mask, as the folder does.
    path.chmod(folder.stat().st_mode & 0o666)
    return {name: tensor.nbytes for name, tensor in tensors.items()}
