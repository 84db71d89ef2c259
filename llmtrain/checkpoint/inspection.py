"""The facts that `llmtrain checkpoint` shows: size and soundness of a checkpoint, differences between two."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError

from llmtrain.checkpoint.folders import BEST_BY, step_of_folder
from llmtrain.checkpoint.manifest import CheckpointManifest, load_manifest
from llmtrain.checkpoint.origin import origin_of
from llmtrain.checkpoint.reader import CheckpointReader, TensorInfo, checkpoint_problems, open_checkpoint
from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import declare_parameters
from llmtrain.errors import CheckpointError
from llmtrain.values.fragment import Box


@dataclass(frozen=True)
class Summary:
    """A checkpoint as its manifest tells it; of a damaged one, what its folder tells, and the `problem`."""

    path: str
    step: int | None
    size_bytes: int
    num_tensors: int
    metric: float | None
    metric_name: str
    problem: str | None


def summary_of(path: Path) -> Summary:
    """Reads the manifest only, and hashes nothing."""
    try:
        reader = open_checkpoint(path, verify=False)
        num_tensors, name = len(list(reader.tensors())), str(reader.about.get(BEST_BY, "loss"))
        return Summary(str(path), reader.step, reader.size_bytes, num_tensors, reader.about.get("metric"), name, None)
    except CheckpointError as error:
        size_bytes = sum(entry.lstat().st_size for entry in path.iterdir())
        return Summary(str(path), step_of_folder(path.resolve().name), size_bytes, 0, None, "", str(error))


def verified(path: Path) -> tuple[CheckpointManifest | None, list[str]]:
    """The manifest of a checkpoint, where there is a good one, and all that is wrong; every file is hashed."""
    try:
        manifest = load_manifest(path)
        return manifest, checkpoint_problems(path, manifest, verify=True)
    except CheckpointError as error:
        return None, [str(error)]


def num_padding_elements(reader: CheckpointReader, tensors: Sequence[TensorInfo]) -> int:
    """Elements of the rows that pad the vocabulary: they lie in the tensors, and the model does not use them."""
    section = origin_of(reader.path, reader.state, reader.config_text, reader.about).section("model")
    try:
        model = ModelConfig.model_validate(section)
    except ValidationError:
        return 0
    if model.vocab_size is None or not model.is_sized:
        return 0
    declared = declare_parameters(model)
    padded = [t for t in tensors if t.kind == "master" and t.name in declared and declared[t.name].vocabulary]
    return sum(max(0, t.shape[0] - model.vocab_size) * t.num_elements // t.shape[0] for t in padded)


@dataclass(frozen=True)
class TensorDifference:
    """Two checkpoints' data of one kind of a tensor, compared.

    `result` is equal, different, or the reason why they cannot be compared; `max_abs` is the largest difference."""

    name: str
    kind: str
    max_abs: float | None
    result: str


def tensor_differences(first: CheckpointReader, second: CheckpointReader) -> Iterator[TensorDifference]:
    """Every tensor of both, by name and kind, compared bit by bit."""
    left = {(tensor.name, tensor.kind): tensor for tensor in first.tensors()}
    right = {(tensor.name, tensor.kind): tensor for tensor in second.tensors()}
    for name, kind in sorted(left.keys() | right.keys()):
        one, other, max_abs = left.get((name, kind)), right.get((name, kind)), None
        if one is None or other is None:
            result = "only in A" if other is None else "only in B"
        elif (one.dtype, one.shape) != (other.dtype, other.shape):
            result = f"{one.dtype} {list(one.shape)} and {other.dtype} {list(other.shape)}"
        else:
            a, b = (reader.read(name, kind, Box.whole(one.shape)).reshape(-1) for reader in (first, second))
            result = "equal" if torch.equal(a.view(torch.uint8), b.view(torch.uint8)) else "different"
            if result == "different":
                max_abs = (a.double() - b.double()).abs().max().item()  # on the CPU: waits for no device
        yield TensorDifference(name, kind, max_abs, result)
