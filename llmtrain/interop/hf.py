"""Families of models that Hugging Face's transformers knows: which one fits, and configurations both ways."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from transformers import PretrainedConfig

from llmtrain.config.model import ModelConfig
from llmtrain.errors import ConfigError
from llmtrain.interop.compressed.form import KEY, METHOD, is_of_method
from llmtrain.interop.differences import differences
from llmtrain.interop.families import bert, gpt2, llama, mistral, mixtral, qwen3, switch, t5
from llmtrain.interop.families.label_heads import (
    BERT_HEADS,
    GPT2_HEADS,
    NO_HEADS,
    ClassNames,
    add_labels,
    decoder_heads,
    label_fields,
)
from llmtrain.interop.families.rotary import require_one_spelling
from llmtrain.interop.name_table import Table, covers
from llmtrain.interop.text.carried import USE_KEYS
from llmtrain.interop.text.special_tokens import NamedTokens


def _no_limits(model: ModelConfig) -> list[str]:
    return []


@dataclass(frozen=True)
class Family:
    """One family: its names, and what its configuration can express."""

    title: str
    stacks: str
    """Its `model.family`."""
    tables: tuple[Table, ...]
    """Forms in which its weights lie in files, the one that is written first."""
    prefix: str
    """Of the tensors in transformers' model; some published folders leave it out."""
    config_class: type[PretrainedConfig]
    to_config: Callable[[ModelConfig], Any]
    """The nearest configuration of a model within `limits`."""
    from_config: Callable[[Any], tuple[dict[str, Any], list[str]]]
    limits: Callable[[ModelConfig], list[str]] = _no_limits
    """Reasons against a model that its configuration, read back, would not show."""
    heads: tuple[str, ...] = ("lm_head.",)
    """Beginnings of names that have no prefix."""
    left_out: str = r"(?!)"
    """Tensors of published folders that the model does not use: of heads for other tasks, or of nothing."""
    label_heads: ClassNames = NO_HEADS

    def tables_for(self, model: ModelConfig) -> list[Table]:
        """The forms that a model can lie in, the one that is written first."""
        whole = [(*table, *self.label_heads.table(model.head)) for table in self.tables]
        found = [table for table in whole if covers(table, model)]
        assert found, f"no table of {self.title} names each parameter exactly once"
        return found

    def is_left_out(self, name: str, model: ModelConfig) -> bool:
        """True for a tensor that a model has no use for."""
        return re.search(self.left_out, name) is not None and not (model.has_pooler and ".pooler." in name)

    def config_of(self, model: ModelConfig) -> Any:
        """The nearest configuration of a model, its head for labels included."""
        return add_labels(self.to_config(model), model, self.label_heads)

    def fields_of(self, config: Any) -> tuple[dict[str, Any], list[str]]:
        """The fields of a ModelConfig, those of a head for labels included, and what llmtrain cannot express."""
        fields, obstacles = self.from_config(config)
        more, against = label_fields(config, self.label_heads)
        return {**fields, **more}, [*obstacles, *against]


FAMILIES = {
    "gpt2": Family(
        "GPT-2",
        "decoder",
        (gpt2.TABLE,),
        "transformer.",
        gpt2.GPT2Config,
        gpt2.to_config,
        gpt2.from_config,
        label_heads=GPT2_HEADS,
    ),
    "llama": Family(
        "Llama",
        "decoder",
        (llama.TABLE,),
        "model.",
        llama.LlamaConfig,
        llama.to_config,
        llama.from_config,
        llama.limits,
        label_heads=decoder_heads("Llama"),
    ),
    "mistral": Family(
        "Mistral",
        "decoder",
        (llama.TABLE,),
        "model.",
        mistral.MistralConfig,
        mistral.to_config,
        mistral.from_config,
        label_heads=decoder_heads("Mistral"),
    ),
    "qwen3": Family(
        "Qwen3",
        "decoder",
        (qwen3.TABLE,),
        "model.",
        qwen3.Qwen3Config,
        qwen3.to_config,
        qwen3.from_config,
        label_heads=decoder_heads("Qwen3"),
    ),
    "mixtral": Family(
        "Mixtral",
        "decoder",
        (mixtral.TABLE, mixtral.STACKED_TABLE),
        "model.",
        mixtral.MixtralConfig,
        mixtral.to_config,
        mixtral.from_config,
        label_heads=decoder_heads("Mixtral"),
    ),
    "bert": Family(
        "BERT",
        "encoder",
        (bert.TABLE,),
        "bert.",
        bert.BertConfig,
        bert.to_config,
        bert.from_config,
        heads=("cls.",),
        left_out=r"^bert\.pooler\.|^cls\.seq_relationship\.",
        label_heads=BERT_HEADS,
    ),
    "t5": Family(
        "T5",
        "encoder_decoder",
        (t5.TABLE, t5.GATED_TABLE),
        "",
        t5.T5Config,
        t5.to_config,
        t5.from_config,
        t5.limits,
        left_out=r"\.EncDecAttention\.relative_attention_bias\.",
    ),
    "switch_transformers": Family(
        "Switch Transformers",
        "encoder_decoder",
        (switch.TABLE,),
        "",
        switch.SwitchTransformersConfig,
        switch.to_config,
        switch.from_config,
        switch.limits,
    ),
}
"""By transformers' `model_type`; a model that several express is written as the first of them."""


def judged(family: Family, model: ModelConfig) -> tuple[list[str], list[str]]:
    """(reasons against a family for a model, keys without a place there that matter in training alone)."""
    if model.family != family.stacks:
        return [f"model.family = {model.family}, {family.title} has {family.stacks}"], []
    try:
        fields, obstacles = family.fields_of(family.config_of(model))
        assert not obstacles, f"{family.title} does not read what it writes: {obstacles}"
        expressed = ModelConfig(**fields)
    except Exception as error:  # classes of transformers validate with several libraries and no common class of error
        reasons = family.limits(model) or [f"its configuration refuses the model: {str(error).splitlines()[0]}"]
        return reasons, []
    against, only_training = differences(model, expressed, family.title)
    return family.limits(model) + against, only_training


def family_for(model: ModelConfig, wanted: str | None = None) -> Family:
    """The family that expresses a model: `wanted` (a model_type), or the first that does.

    Raises ConfigError with every reason against each family.
    """
    if wanted is not None and wanted not in FAMILIES:
        raise ConfigError(f"--family {wanted}: must be one of {', '.join(FAMILIES)}.")
    families = list(FAMILIES.values()) if wanted is None else [FAMILIES[wanted]]
    against = {family.title: judged(family, model)[0] for family in families}
    fitting = [family for family in families if not against[family.title]]
    if fitting:
        return fitting[0]
    reasons = "\n".join(f"  {title}: {'; '.join(found)}." for title, found in against.items())
    raise ConfigError(
        f"No Hugging Face family expresses this model:\n{reasons}\n"
        "Only models whose every reason is settled for one family can be exported; train such a model to export it."
    )


def hf_config(model: ModelConfig, tokens: NamedTokens, wanted: str | None = None) -> PretrainedConfig:
    """transformers' configuration of a model. Raises ConfigError where no family fits."""
    config: Any = family_for(model, wanted).config_of(model)
    # Where no text of training had a beginning of its own, none is named: readers would put it there.
    begin = tokens.begin_id if model.family == "decoder" else next(iter(tokens.bos_ids), None)
    config.eos_token_id, config.bos_token_id = tokens.eos_id, begin
    config.pad_token_id = None if tokens.pad is None else tokens.pad[1]
    if model.family == "encoder_decoder":
        config.pad_token_id = config.decoder_start_token_id = tokens.start_id
    return config


def model_config(config: PretrainedConfig) -> ModelConfig:
    """The model that a configuration of a known family describes. Raises ConfigError with every obstacle."""
    fields, obstacles = FAMILIES[config.model_type].fields_of(config)
    section = getattr(config, KEY, None)
    if section is not None and not is_of_method(section):
        obstacles.append(f"{KEY} is of another method than {METHOD}, the only one that can be read")
    if obstacles:
        raise ConfigError(f"This {config.model_type} model cannot be imported: {'; '.join(obstacles)}.")
    try:
        return ModelConfig(**fields)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc']))} = {repr(fault['input'])[:60]}: {fault['msg']}"
            for fault in error.errors()
        )
        raise ConfigError(f"This {config.model_type} model cannot be imported: {faults}.") from None


def not_taken_over(content: Mapping[str, Any], config: PretrainedConfig, model: ModelConfig) -> list[str]:
    """Keys of a config.json whose values are lost on the way to a model and back."""
    back = FAMILIES[config.model_type].config_of(model).to_dict()
    here = config.to_dict()
    return [
        f"{key} = {value!r} is not taken over"
        for key, value in sorted(content.items())
        if key not in _ELSEWHERE and key in here and here[key] is not None and here[key] != back.get(key)
    ]


_ELSEWHERE = {
    "architectures", "transformers_version", "dtype", "torch_dtype", "model_type", "use_cache", "_name_or_path",
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "rope_scaling", "rope_theta",
    "num_sparse_encoder_layers", "num_sparse_decoder_layers", "is_encoder_decoder", "id2label", "label2id",
    "problem_type", "gradient_checkpointing", "return_dict", "output_past", "max_window_layers", "tie_word_embeddings",
    "quantization_config", *USE_KEYS,
}  # fmt: skip
"""Keys that the tokenizer or the weights answer, or that say nothing about the model and are carried along."""


def parse_config(content: Mapping[str, Any], where: str) -> PretrainedConfig:
    """The configuration in a config.json. Raises ConfigError for a family that is not known, or wrong values."""
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ConfigError(f"{where}: model_type = {kind}: can import {', '.join(FAMILIES)}.")
    require_one_spelling(content, where)
    try:
        config = FAMILIES[kind].config_class.from_dict(dict(content))
    except Exception as error:  # transformers validates with several libraries and no common class of error
        raise ConfigError(f"{where}: transformers refuses this configuration: {error}") from error
    if isinstance(content.get("tie_word_embeddings"), bool):
        config.tie_word_embeddings = content["tie_word_embeddings"]  # T5's class always says true
    return config
