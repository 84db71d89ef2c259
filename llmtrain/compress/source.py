"""What is compressed: a model of a run, a checkpoint or a Hugging Face folder, one tensor at a time; and what its
perplexity may become."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from llmtrain.checkpoint.reader import CheckpointReader
from llmtrain.checkpoint.saved_run import saved_config, saved_data, saved_finetune, saved_precision, saved_quantize
from llmtrain.compress.samples import SampleText
from llmtrain.config.finetune import QuantizeConfig
from llmtrain.config.model import ModelConfig
from llmtrain.errors import ConfigError, ExportError
from llmtrain.infer.hugging_face import folder_special_tokens, open_trained, trained_weights
from llmtrain.infer.tokenizer import model_tokenizer
from llmtrain.interop.hf_export import DTYPES
from llmtrain.interop.hf_import import open_hf_folder
from llmtrain.interop.name_table import ReadTensor
from llmtrain.interop.text.special_tokens import NamedTokens, named_tokens
from llmtrain.values.batch import Batch
from llmtrain.values.precision import type_name
from llmtrain.values.tokenizer import Tokenizer
from llmtrain.words import percent_change


@dataclass(frozen=True)
class ModelSource:
    """A model whose weights are read in fp32, and what was said of its training.

    `trained_for` is the section `quantize` of the run, which has computed in the type `dtype`; else that is the usual
    type of what stays as it is.
    """

    path: Path
    model: ModelConfig
    read: ReadTensor
    tokenizer: Tokenizer
    named: NamedTokens
    facts: Mapping[str, str]
    config: Mapping[str, Any]
    """The run's configuration; of others, sections that stand for it."""
    checkpoint: CheckpointReader | None = None
    """None of a Hugging Face folder."""
    trained_for: QuantizeConfig | None = None
    dtype: str = "bfloat16"

    def as_computed(self) -> "ModelSource":
        """With the weights that training for whole numbers has computed with: rounded to `dtype`. Others stay."""
        if self.trained_for is None:
            return self
        dtype = DTYPES[self.dtype]

        def rounded(name: str, expert: int | None = None) -> Tensor:
            return self.read(name, expert).to(dtype).float()

        return replace(self, read=rounded)

    def text(self) -> SampleText:
        """What makes rows of text for it."""
        seed = self.config.get("seed", 0)
        return SampleText(self.model, self.tokenizer, self.config["data"], seed if isinstance(seed, int) else 0)

    def batches(self, split: str, option: str, given: str | None, count: int) -> list[Batch]:
        """So many samples of the data that an option names, or of the run's own."""
        own = [str(found["path"]) for found in self.config["data"].get(split) or () if "path" in found]
        places = [given] if given is not None else own
        if not places:
            raise ConfigError(
                f"{option}: is needed: {self.path} names no data.{split}. Give a folder of shards, or a text file."
            )
        text, share = self.text(), -(-count // len(places))
        return [batch for place in places for batch in text.batches(place, share)]


def open_source(path: Path, tokenizer: Path | None) -> ModelSource:
    """Raises as `find_checkpoint`, `open_hf_folder` and `model_tokenizer`; ConfigError for a quantized folder, and for
    a finetuning whose additions are no part of the weights."""
    if (path / "config.json").is_file():
        return _of_folder(path, tokenizer)
    checkpoint, trained = open_trained(path, tokenizer)
    read = trained_weights(checkpoint, trained.config).read
    config = {**saved_config(checkpoint), "data": saved_data(checkpoint)}
    text = trained.tokenizer, trained.tokens
    section, finetune = saved_quantize(checkpoint), saved_finetune(checkpoint)
    # Of what was trained beside a base, the sums are no whole numbers.
    trained_for = section if finetune is None or finetune.method == "full" else None
    dtype = ModelSource.dtype if trained_for is None else type_name(saved_precision(checkpoint))
    whole = trained.facts, config, checkpoint, trained_for, dtype
    return ModelSource(checkpoint.path, trained.config, read, *text, *whole)


def _of_folder(path: Path, tokenizer: Path | None) -> ModelSource:
    folder = open_hf_folder(path)
    if folder.numbers is not None:
        raise ConfigError(
            f"{path}: is quantized already ({folder.numbers.form.told}). Give the model that it was made of."
        )
    text = model_tokenizer(tokenizer, folder.tokenizer_path, folder.model)
    config = {"data": {"special_tokens": folder_special_tokens(folder.model, text)}}
    return ModelSource(path, folder.model, folder.tensor, text, named_tokens(text), {}, config)


def require_near(before: float, after: float, bound: float, advice: str) -> None:
    """Raise ExportError where a perplexity grows by more than is allowed; one that is no number is refused too."""
    if after <= before * (1 + bound):
        return
    raise ExportError(
        f"--max-perplexity-increase {bound:g}: the perplexity would be {after:.4f}, and was {before:.4f}: "
        f"{percent_change(before, after)}. Nothing is written. Try {advice}; or allow it."
    )
