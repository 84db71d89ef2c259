"""A trained model, ready to use: from a run, a checkpoint, a Hugging Face folder or a GGUF file.

Shape suffixes: B batch, S sequence, T the encoder's sequence, V vocabulary.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmtrain.checkpoint.find import find_checkpoint
from llmtrain.checkpoint.folders import LONGEST_MANIFEST, MANIFEST
from llmtrain.checkpoint.saved_run import saved_architecture, saved_data, saved_finetune
from llmtrain.config.finetune import FinetuneConfig
from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import declare_parameters, parameter_shapes
from llmtrain.data.token_roles import TrainedTokens
from llmtrain.data.tokenizer import TOKENIZER_NAMES
from llmtrain.errors import ConfigError
from llmtrain.files import read_bytes
from llmtrain.finetune.additions import add_trained_parts
from llmtrain.finetune.rounded_weights import computed_weights, linears_with_rounded_inputs
from llmtrain.infer.batching.batch import ContinuousBatch
from llmtrain.infer.batching.scheduler import Limits
from llmtrain.infer.packed.choice import KernelChoice, MatrixPacking, StoredMatrices
from llmtrain.infer.sharded.works import Found, ModelWork
from llmtrain.infer.tokenizer import model_tokenizer
from llmtrain.interop.examples import Example
from llmtrain.interop.name_table import ReadTensor
from llmtrain.models.experts.mixture import MoE
from llmtrain.models.experts.router import bias_name
from llmtrain.models.rounded_inputs import round_inputs
from llmtrain.models.transformer import Transformer, build_model, counted_positions
from llmtrain.values.batch import PADDING, ModelInputs
from llmtrain.values.fragment import Box, FragmentSource
from llmtrain.values.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llmtrain.infer.sharded.ranks import LeadingRank

_logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
"""What PEFT calls its settings."""
GGUF_SUFFIX = ".gguf"


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation mode, in fp32, the tokenizer that it was trained with, where one was found, and the data
    section of the configuration that it was trained with, where it was trained here."""

    model: Transformer
    tokenizer_path: Path | None
    data: Mapping[str, Any] = field(default_factory=dict)
    tokens: TrainedTokens = field(default_factory=TrainedTokens)
    """The checkpoint's record of that tokenizer."""
    identity: str = ""
    """A hash that is another one where the weights are others."""
    ranks: "LeadingRank | None" = None
    """Those that hold the model, where `model` is only this process's part."""
    own_tokenizer: Tokenizer | None = None
    """In place of a path, where the tokenizer is in the model's own file."""
    kernels: str = ""
    """How its quantized matrices are multiplied, in words."""

    def batch(self, limits: Limits) -> ContinuousBatch:
        """A new batch, the only one at a time where the model's parts lie on several ranks."""
        return ContinuousBatch(self.model if self.ranks is None else self.ranks.runner(limits), limits)

    def do(self, work: ModelWork[Found]) -> Found:
        """What is found out with the whole model. Not while a step is carried out."""
        return work.run(self.model) if self.ranks is None else self.ranks.do(work)

    def tokenizer(self) -> Tokenizer:
        """Raises ConfigError where none was found."""
        return self.tokenizer_or(None)

    def tokenizer_or(self, given: Path | None) -> Tokenizer:
        """The tokenizer, or another file of the same one: see `model_tokenizer`."""
        beside = self.own_tokenizer or self.tokenizer_path
        return model_tokenizer(given, beside, self.model.config, self.tokens)


def named_device(name: str) -> torch.device:
    """auto: a GPU where there is one. Raises ConfigError for a name that is none, and for a GPU that there is not."""
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {name}: must be auto, cpu or cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"--device cuda: torch {torch.__version__} finds no GPU that it can use. Give --device cpu or auto; "
            "`llmtrain doctor` says what is missing."
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


@torch.no_grad()
def logits_of(model: Transformer, example: Example) -> Tensor:
    """[B, S, V] in fp32; of a head for labels as `LabelHead` has them."""
    inputs = ModelInputs(
        example.tokens_BS,
        counted_positions(example.tokens_BS),
        segments_of(example.valid_BS),
        encoder_tokens_BT=example.encoder_tokens_BT,
        encoder_segments_BT=segments_of(example.encoder_valid_BT),
        token_types_BS=example.types_BS,
    )
    return model.logits(model(inputs)[0], inputs)


def segments_of(valid: Tensor | None) -> Tensor | None:
    """One document, and padding where `valid` is False."""
    return None if valid is None else torch.where(valid, 0, PADDING)


def find_tokenizer_of(checkpoint: Path) -> Path | None:
    """The tokenizer in the run folder of a checkpoint."""
    run = checkpoint.absolute().parent.parent
    return next((run / name for name in TOKENIZER_NAMES if os.path.lexists(run / name)), None)


def checkpoint_tensors(checkpoint: FragmentSource, model: ModelConfig, dtype: torch.dtype) -> ReadTensor:
    """Reads one tensor at a time from a checkpoint's fragments, whatever layout they are from, rounded to a type."""
    shapes = parameter_shapes(model)

    def read(name: str, expert: int | None = None) -> Tensor:
        shape = shapes[name]
        if expert is None:
            return checkpoint.read(name, "master", Box.whole(shape)).to(dtype)
        box = Box((expert, *[0] * (len(shape) - 1)), (1, *shape[1:]))
        return checkpoint.read(name, "master", box)[0].to(dtype)

    return read


@torch.no_grad()
def build_from(config: ModelConfig, read: Callable[[str], Tensor]) -> Transformer:
    """The model with weights that are read one at a time, in evaluation mode, on the CPU."""
    model = build_model(config)
    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        parameter.copy_(read(name))
    return model.eval()


@torch.no_grad()
def build_trained(
    config: ModelConfig,
    source: FragmentSource,
    device: torch.device,
    finetune: FinetuneConfig | None = None,
    prepare: Callable[[Transformer], None] | None = None,
) -> Transformer:
    """The model, with what finetuning has added, with the master weights of a source, in evaluation mode. `prepare` may
    put others in place of its modules on the meta device."""
    model = build_model(config)
    add_trained_parts(model, finetune, declare_parameters(config, finetune))
    if prepare is not None:
        prepare(model)
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        parameter.copy_(source.read(name, "master", Box.whole(parameter.shape)))
    load_router_biases(model, source, device)
    return model.eval()


def load_router_biases(model: Transformer, source: FragmentSource, device: torch.device) -> None:
    """Set the routing biases of training without an auxiliary loss; they are stored in steps of its rate."""
    moe = model.config.moe
    if moe is None or not moe.bias_update_rate:
        return
    for stack in model.stacks:
        for number, layer in stack.layers.items():
            name = bias_name(f"{stack.side}.layers.{number}")
            if isinstance(layer.moe, MoE) and (shape := source.global_shape(name, "buffer")) is not None:
                steps_E = source.read(name, "buffer", Box.whole(shape)).to(device)
                layer.moe.router.bias_E = steps_E * moe.bias_update_rate


@dataclass(frozen=True)
class FoundModel:
    """A trained model that is found, and whose weights are not read yet; the rest is as of `TrainedModel`."""

    config: ModelConfig
    weights: FragmentSource
    finetune: FinetuneConfig | None = None
    tokenizer_path: Path | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    tokens: TrainedTokens = field(default_factory=TrainedTokens)
    identity: str = ""
    rounded: frozenset[str] = frozenset()
    """Linears whose inputs are rounded: a quantized folder says so, or they were in training."""
    matrices: StoredMatrices | None = None
    """The matrices of a quantized folder. None: there are none, or something is added to them."""
    own_tokenizer: Tokenizer | None = None

    def read(self, device: torch.device, kernels: KernelChoice | None = None) -> TrainedModel:
        """The whole model on a device; quantized matrices are dequantized where `kernels` does not say otherwise.

        Raises ConfigError for kernels that there are none for.
        """
        packing = None if kernels is None else MatrixPacking(kernels, self.matrices, device)
        model = build_trained(self.config, self.weights, device, self.finetune, packing and packing.put_into)
        if packing is None:
            round_inputs(model, self.rounded)
            return self.trained(model)
        round_inputs(model, self.rounded - packing.linears)
        told = f"kernels: {packing.told}" if packing.told else ""
        if told:
            _logger.info("%s", told)
        trained = replace(self, identity=packing.identity(self.identity)).trained(model)
        return replace(trained, kernels=told)

    def trained(self, model: Transformer, ranks: "LeadingRank | None" = None) -> TrainedModel:
        """With the weights in a model, or in the part of one that this process holds: see `TrainedModel`."""
        about = (self.tokenizer_path, self.data, self.tokens, self.identity)
        return TrainedModel(model, *about, ranks, self.own_tokenizer)


BASE_USE = "goes with an adapter's folder, and with a run whose base was moved"


def find_checkpoint_model(path: Path, also: Sequence[str] = (), base: Path | None = None) -> FoundModel:
    """The model of a checkpoint or of a run's newest checkpoint; `also` and `base` as in `find_checkpoint`.

    Raises ConfigError for a `base` where its own lies where it was, or there is none.
    """
    checkpoint = find_checkpoint(path, also, base)
    if base is not None and checkpoint.base_moved_to is None:
        raise ConfigError(f"--base {base}: {BASE_USE}, and {path} needs none.")
    model = saved_architecture(checkpoint)
    return FoundModel(
        model,
        computed_weights(checkpoint, model),
        saved_finetune(checkpoint),
        find_tokenizer_of(checkpoint.path),
        saved_data(checkpoint),
        TrainedTokens.of(checkpoint.about),
        hashlib.sha256(read_bytes(checkpoint.path / MANIFEST, LONGEST_MANIFEST)).hexdigest(),
        linears_with_rounded_inputs(checkpoint, model),
    )


def find_model(path: Path, base: Path | None = None) -> FoundModel:
    """The model of a run, a checkpoint, a Hugging Face folder, a GGUF file or a PEFT folder; `base` is that of the last
    one, or of a run whose base was moved."""
    if (path / ADAPTER_CONFIG).is_file():
        return _adapted_model(path, base)
    if (path / "config.json").is_file():
        if base is not None:
            raise ConfigError(f"--base {base}: {BASE_USE}, and {path} needs none.")
        from llmtrain.interop.installation import CONFIGURATIONS, require_transformers

        require_transformers(CONFIGURATIONS)
        from llmtrain.interop.hf_import import open_hf_folder  # brings in transformers, for which no run shall wait

        folder = open_hf_folder(path)
        for text in folder.changed:
            _logger.warning("%s", text)
        identity = files_identity(_model_files(path))
        if folder.numbers is not None:
            _logger.warning("%s: %s", path, folder.numbers.form.told)
        found = FoundModel(folder.model, folder, tokenizer_path=folder.tokenizer_path, identity=identity)
        if folder.numbers is None:
            return found
        matrices = StoredMatrices(folder.numbers.form, folder.quantized, folder.whole_numbers)
        return replace(found, rounded=folder.rounded_inputs, matrices=matrices)
    if path.suffix == GGUF_SUFFIX or any(path.glob(f"*{GGUF_SUFFIX}")):
        if base is not None:
            raise ConfigError(f"--base {base}: {BASE_USE}, and {path} needs none.")
        return _gguf_model(path)
    kinds = [
        "a Hugging Face folder (with config.json and safetensors)", f"a PEFT folder (with {ADAPTER_CONFIG})",
        "a GGUF file",
    ]  # fmt: skip
    return find_checkpoint_model(path, kinds, base)


def _gguf_model(path: Path) -> FoundModel:
    """The model of a GGUF file, or of a folder with one."""
    from llmtrain.interop.installation import CONFIGURATIONS, require_transformers

    require_transformers(CONFIGURATIONS)
    from llmtrain.infer.gguf import find_gguf_model, gguf_file  # brings in transformers

    file = gguf_file(path)
    if file is None:
        raise ConfigError(f"{path}: no such file.")
    return find_gguf_model(file)


def _adapted_model(path: Path, base: Path | None) -> FoundModel:
    """The model of a PEFT folder and its base."""
    from llmtrain.interop.installation import CONFIGURATIONS, require_transformers

    require_transformers(CONFIGURATIONS)
    from llmtrain.interop.peft.adapted import adapted, base_of_adapter  # brings in transformers

    place = base_of_adapter(path, base)
    found = find_model(place)
    weights, finetune = adapted(path, place, found.config, found.weights, found.finetune)
    own = next((path / name for name in TOKENIZER_NAMES if (path / name).is_file()), None)
    identity = hashlib.sha256(f"{found.identity}{files_identity(_model_files(path))}".encode()).hexdigest()
    beside = own or found.tokenizer_path
    # The matrices are no longer all that there is of these weights.
    found = replace(found, matrices=None, own_tokenizer=None if own else found.own_tokenizer)
    return replace(found, weights=weights, finetune=finetune, tokenizer_path=beside, identity=identity)


def _model_files(path: Path) -> list[Path]:
    """The files of a folder that say what its model computes."""
    return sorted(found for found in path.iterdir() if found.suffix in (".safetensors", ".json"))


def files_identity(files: Iterable[Path]) -> str:
    """A hash of the names, sizes and times of files: to read them all would take long."""
    facts = [(found.name, found.stat().st_size, found.stat().st_mtime_ns) for found in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def load_model(
    path: Path, device: torch.device, base: Path | None = None, kernels: KernelChoice | None = None
) -> TrainedModel:
    """What `find_model` finds, on a device: see `FoundModel.read`."""
    return find_model(path, base).read(device, kernels)
