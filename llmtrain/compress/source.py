"""What is compressed: a model of a run, a checkpoint or a Hugging Face folder, one tensor at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from llmtrain.compress.samples import SampleText
from llmtrain.config.finetune import QuantizeConfig
from llmtrain.config.model import ModelConfig
from llmtrain.errors import CheckpointError, ConfigError
from llmtrain.infer.hugging_face import folder_special_tokens, open_trained, trained_weights
from llmtrain.infer.model import saved_config, saved_data
from llmtrain.infer.tokenizer import model_tokenizer
from llmtrain.interop.hf_export import DTYPES
from llmtrain.interop.hf_import import open_hf_folder
from llmtrain.interop.name_table import ReadTensor
from llmtrain.interop.text.special_tokens import NamedTokens, named_tokens
from llmtrain.values.tokenizer import Tokenizer

TRAINED_IN = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""The type of weights by `train.precision`."""


@dataclass(frozen=True)
class ModelSource:
    """A model whose weights are read in fp32, and what was said of its training.

    `trained_for` is the section `quantize` of the run: then the weights are those that training has computed with,
    which are rounded to the type `dtype`; else that is the usual type of what stays as it is.
    """

    path: Path
    model: ModelConfig
    read: ReadTensor
    tokenizer: Tokenizer
    named: NamedTokens
    facts: Mapping[str, str]
    config: Mapping[str, Any]
    """The run's configuration; of others, sections that stand for it."""
    trained_for: QuantizeConfig | None = None
    dtype: str = "bfloat16"

    def text(self) -> SampleText:
        """What makes rows of text for it."""
        seed = self.config.get("seed", 0)
        return SampleText(self.model, self.tokenizer, self.config["data"], seed if isinstance(seed, int) else 0)

    def data_sets(self, split: str) -> list[str]:
        """The paths of the run's data of a split."""
        return [str(found["path"]) for found in self.config["data"].get(split) or () if "path" in found]


def open_source(path: Path, tokenizer: Path | None) -> ModelSource:
    """Raises as `find_checkpoint`, `open_hf_folder` and `model_tokenizer`; ConfigError for a quantized folder, and for
    a finetuning whose additions are no part of the weights."""
    if (path / "config.json").is_file():
        return _of_folder(path, tokenizer)
    checkpoint, trained = open_trained(path, tokenizer)
    read = trained_weights(checkpoint, trained.config).read
    config = {**saved_config(checkpoint), "data": saved_data(checkpoint)}
    text = trained.tokenizer, trained.tokens
    trained_for = _trained_for(checkpoint.path, config.get("quantize"))
    if trained_for is None:
        return ModelSource(checkpoint.path, trained.config, read, *text, trained.facts, config)
    dtype = TRAINED_IN[config["train"]["precision"]]

    def rounded(name: str, expert: int | None = None) -> Tensor:
        return read(name, expert).to(DTYPES[dtype]).float()

    return ModelSource(checkpoint.path, trained.config, rounded, *text, trained.facts, config, trained_for, dtype)


def _trained_for(checkpoint: Path, section: Any) -> QuantizeConfig | None:
    try:
        return None if section is None else QuantizeConfig.model_validate(section)
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]
        key = ".".join(("quantize", *map(str, reason["loc"])))
        raise CheckpointError(f"{checkpoint}: {key} of its configuration: {reason['msg']}.") from None


def _of_folder(path: Path, tokenizer: Path | None) -> ModelSource:
    folder = open_hf_folder(path)
    if folder.numbers is not None:
        raise ConfigError(
            f"{path}: is quantized already ({folder.numbers.form.told}). Give the model that it was made of."
        )
    text = model_tokenizer(tokenizer, folder.tokenizer_path, folder.model)
    config = {"data": {"special_tokens": folder_special_tokens(folder.model, text)}}
    return ModelSource(path, folder.model, folder.tensor, text, named_tokens(text), {}, config)
