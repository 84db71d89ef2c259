"""What a checkpoint says of the run that saved it: sections of its configuration, checked."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from llmtrain.checkpoint.origin import origin_of
from llmtrain.checkpoint.reader import CheckpointReader
from llmtrain.config.data import SpecialTokensConfig
from llmtrain.config.finetune import FinetuneConfig, QuantizeConfig
from llmtrain.config.model import ModelConfig
from llmtrain.config.section import Section
from llmtrain.errors import CheckpointError
from llmtrain.values.precision import known_precision

Found = TypeVar("Found", bound=Section)


def saved_config(checkpoint: CheckpointReader) -> Mapping[str, Any]:
    """The configuration in a checkpoint; that of an imported one has a model section and little else."""
    return origin_of(checkpoint.path, {}, checkpoint.config_text, {}).config


def saved_data(checkpoint: CheckpointReader) -> dict[str, Any]:
    """The data section of the configuration in a checkpoint, empty of an imported one."""
    data = origin_of(checkpoint.path, {}, checkpoint.config_text, {}).section("data")
    try:
        special = SpecialTokensConfig.model_validate(data.get("special_tokens") or {})
    except ValidationError as error:
        raise CheckpointError(f"{checkpoint.path}: the data.special_tokens of its configuration: {error}") from None
    return data | {"special_tokens": special.model_dump()}


def saved_architecture(checkpoint: CheckpointReader) -> ModelConfig:
    """The model section of the configuration in a checkpoint."""
    try:
        model = ModelConfig.model_validate(saved_config(checkpoint)["model"])
        if not model.is_sized:
            raise ValueError("vocab_size, or the number of labels, is missing")
        return model
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.path}: its configuration has no model section that fits: {error}") from None


def saved_finetune(checkpoint: CheckpointReader) -> FinetuneConfig | None:
    """The section finetune of the configuration in a checkpoint."""
    return _section(checkpoint, "finetune", FinetuneConfig)


def saved_quantize(checkpoint: CheckpointReader) -> QuantizeConfig | None:
    """The section quantize of the configuration in a checkpoint."""
    return _section(checkpoint, "quantize", QuantizeConfig)


def saved_precision(checkpoint: CheckpointReader) -> str:
    """The train.precision of the configuration in a checkpoint that a run has saved."""
    train = origin_of(checkpoint.path, {}, checkpoint.config_text, {}).section("train")
    try:
        return known_precision(train.get("precision"))
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path}: train.precision of its configuration: {error}.") from None


def _section(checkpoint: CheckpointReader, name: str, form: type[Found]) -> Found | None:
    """A section of the configuration in a checkpoint. Raises CheckpointError that names the key that is wrong."""
    found = saved_config(checkpoint).get(name)
    try:
        return None if found is None else form.model_validate(found)
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]
        key = ".".join((name, *map(str, reason["loc"])))
        raise CheckpointError(f"{checkpoint.path}: {key} of its configuration: {reason['msg']}.") from None
