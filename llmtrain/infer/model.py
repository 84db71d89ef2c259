"""A trained model, ready to use: from a run, a checkpoint, or a Hugging Face folder."""

from dataclasses import dataclass
from pathlib import Path

import torch
from ruamel.yaml import YAML
from torch import Tensor

from llmtrain.checkpoint.folders import CHECKPOINTS, MANIFEST, folder_of_checkpoints, is_checkpoint, nearest_checkpoint
from llmtrain.checkpoint.fragments import Box, FragmentSource
from llmtrain.checkpoint.manager import find_newest_valid
from llmtrain.checkpoint.reader import CheckpointReader, open_checkpoint
from llmtrain.config.model import ModelConfig
from llmtrain.data.tokenizer import TOKENIZER_NAMES, Tokenizer, load_tokenizer
from llmtrain.errors import ConfigError
from llmtrain.interop.hf_import import open_hf_folder
from llmtrain.models.build import build_model
from llmtrain.models.transformer import ModelInputs, Transformer


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation mode, in fp32, and the tokenizer that it was trained with, where one was found."""

    model: Transformer
    tokenizer_path: Path | None

    def tokenizer(self) -> Tokenizer:
        """Raises ConfigError where none was found."""
        if self.tokenizer_path is None:
            raise ConfigError("No tokenizer lies beside the model. Name one with --tokenizer.")
        return load_tokenizer(self.tokenizer_path)

    @torch.no_grad()
    def logits(self, tokens_BS: Tensor) -> Tensor:
        """[B, S, V] in fp32."""
        positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand(tokens_BS.shape)
        return self.model.logits(self.model(ModelInputs(tokens_BS, positions_BS))[0])


def find_checkpoint(path: Path) -> CheckpointReader:
    """The checkpoint at a path, or the newest valid one of the run at a path; every file is hashed.

    Raises ConfigError where there is neither, CheckpointError where it is damaged.
    """
    if is_checkpoint(path):
        return open_checkpoint(path)
    folder = folder_of_checkpoints(path)
    newest = find_newest_valid(folder, warn=lambda text: None)[0] if folder else None
    if newest is not None:
        return newest
    near = nearest_checkpoint(path) or "a run folder such as runs/NAME, or runs/NAME/checkpoints/step-00000050"
    raise ConfigError(
        f"{path}: neither a checkpoint (a folder with {MANIFEST}) nor a run with one (a folder with {CHECKPOINTS}/). "
        f"Try {near}."
    )


def find_tokenizer_of(checkpoint: Path) -> Path | None:
    """The tokenizer in the run folder of a checkpoint."""
    run = checkpoint.absolute().parent.parent
    return next((run / name for name in TOKENIZER_NAMES if (run / name).is_file()), None)


def saved_architecture(checkpoint: CheckpointReader) -> ModelConfig:
    """The model section of the configuration in a checkpoint."""
    return ModelConfig.model_validate(YAML(typ="safe", pure=True).load(checkpoint.config_text)["model"])


@torch.no_grad()
def build_trained(config: ModelConfig, source: FragmentSource, device: torch.device) -> Transformer:
    """The model with the master weights of a source, in evaluation mode."""
    model = build_model(config)
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        parameter.copy_(source.read(name, "master", Box.whole(parameter.shape)))
    return model.eval()


def load_checkpoint(path: Path, device: torch.device) -> TrainedModel:
    """The model of a checkpoint or of a run's newest checkpoint."""
    checkpoint = find_checkpoint(path)
    model = build_trained(saved_architecture(checkpoint), checkpoint, device)
    return TrainedModel(model, find_tokenizer_of(checkpoint.path))


def load_model(path: Path, device: torch.device) -> TrainedModel:
    """The model of a run, a checkpoint or a Hugging Face folder."""
    if (path / "config.json").is_file():
        folder = open_hf_folder(path)
        return TrainedModel(build_trained(folder.model, folder, device), folder.tokenizer_path)
    return load_checkpoint(path, device)
