"""Tiny models with random adapters, their Hugging Face folders, and what they compute."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llmtrain.config.finetune import FinetuneConfig
from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import declare_parameters
from llmtrain.finetune.merging import MergedWeights
from llmtrain.infer.model import build_trained, logits_of
from llmtrain.interop.examples import Example
from llmtrain.interop.hf import FAMILIES
from llmtrain.interop.hf_export import write_config_json
from llmtrain.interop.name_table import iter_theirs
from llmtrain.interop.peft.writing import TrainedAdapter
from llmtrain.interop.proof import their_inputs
from llmtrain.interop.weight_files import write_weights
from llmtrain.values.fragment import Box, FragmentSource
from tests.unit.interop.models import BERT, LLAMA, random_example, random_model
from tests.unit.interop.models import MODELS as TOKEN_MODELS

CPU = torch.device("cpu")

MODELS = {
    **TOKEN_MODELS,
    "bert classifier": BERT.with_keys({"head": "classifier", "num_labels": 3}),
    "bert token_classifier": BERT.with_keys({"head": "token_classifier", "labels": ("O", "B", "I")}),
    "bert span": BERT.with_keys({"head": "span"}),
    "llama token_classifier": LLAMA.with_keys({"head": "token_classifier", "num_labels": 4}),
}
"""Names begin with transformers' model_type."""


@dataclass(frozen=True)
class Tensors:
    """A source of fragments that are in memory."""

    held: dict[str, Tensor]

    def read(self, name: str, kind: str, box: Box) -> Tensor:
        return self.held[name][box.slices_in(Box.whole(self.held[name].shape))].clone()

    def global_shape(self, name: str, kind: str) -> tuple[int, ...] | None:
        return tuple(self.held[name].shape) if name in self.held else None


def base_of(name: str) -> Tensors:
    return Tensors({key: value.detach().clone() for key, value in random_model(MODELS[name]).named_parameters()})


def held_by(adapter: TrainedAdapter) -> dict[str, Tensor]:
    """The tensors of an adapter that was made here."""
    assert isinstance(adapter.source, Tensors)
    return adapter.source.held


def write_base(folder: Path, name: str) -> Path:
    """The Hugging Face folder of a model, without tokenizer."""
    model, source, family = MODELS[name], base_of(name), FAMILIES[name.split()[0]]
    folder.mkdir(parents=True)
    config = family.config_of(model)
    config.dtype = torch.float32
    write_config_json(folder, config)

    def read(name: str, expert: int | None = None) -> Tensor:
        return source.held[name] if expert is None else source.held[name][expert]

    write_weights(folder, iter_theirs(family.tables_for(model)[0], model, read), 10**9)
    return folder


def write_inputs(file: Path, name: str) -> Path:
    inputs = their_inputs(random_example(MODELS[name]))
    save_file({key: value.contiguous() for key, value in inputs.items() if value is not None}, file)
    return file


def random_adapter(name: str, finetune: dict[str, Any], seed: int = 3) -> TrainedAdapter:
    """An adapter beside a random base. What is trained also has changed by as much."""
    settings, model = FinetuneConfig.model_validate(finetune), MODELS[name]
    generator, source = torch.Generator().manual_seed(seed), base_of(name)
    adapter = TrainedAdapter(source, model, settings, FAMILIES[name.split()[0]])
    for key, parameter in declare_parameters(model, settings).items():
        if key not in source.held:
            source.held[key] = 0.05 * torch.randn(parameter.shape, generator=generator)
    for key in adapter.trained_also():
        noise = 0.05 * torch.randn(source.held[key].shape, generator=generator)
        if key in ("embeddings.word.weight", "head.weight"):
            noise[model.vocabulary :] = 0
        source.held[key] = source.held[key] + noise
    return adapter


@torch.no_grad()
def adapted_logits(source: FragmentSource, model: ModelConfig, finetune: FinetuneConfig, example: Example) -> Tensor:
    return logits_of(build_trained(model, source, CPU, finetune), example)


@torch.no_grad()
def merged_logits(source: FragmentSource, model: ModelConfig, finetune: FinetuneConfig, example: Example) -> Tensor:
    return logits_of(build_trained(model, MergedWeights(source, model, finetune), CPU), example)
