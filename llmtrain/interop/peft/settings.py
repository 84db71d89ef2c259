"""adapter_config.json: what PEFT is told of an adapter, and what of it can be read here."""

import math
import re
from collections.abc import Mapping
from typing import Any

from llmtrain.config.finetune import LoraConfig
from llmtrain.config.model import ModelConfig
from llmtrain.errors import ConfigError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

TASKS = {"decoder": "CAUSAL_LM", "encoder": None, "encoder_decoder": "SEQ_2_SEQ_LM"}
"""PEFT's task by model.family; it has none for masked language models."""
HEAD_TASKS = {"classifier": "SEQ_CLS", "token_classifier": "TOKEN_CLS", "span": "QUESTION_ANS"}
"""Its task by model.head, of heads for labels."""

_USUAL: dict[str, Any] = {
    "auto_mapping": None, "base_model_name_or_path": None, "inference_mode": True, "revision": None, "task_type": None,
}  # fmt: skip


def lora_settings(lora: LoraConfig, model: ModelConfig, base: str | None) -> dict[str, Any]:
    """The settings of an adapter whose modules all have the same rank; what depends on modules is to be added."""
    return {
        **_USUAL,
        "alpha_pattern": {},
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "lora_alpha": whole(lora.alpha),
        "lora_dropout": lora.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.rank,
        "rank_pattern": {},
        "target_modules": [],
        "target_parameters": None,
        "task_type": HEAD_TASKS.get(model.head, TASKS[model.family]),
        "use_dora": False,
        "use_rslora": lora.rslora,
    }


def prompt_settings(tokens: int, model: ModelConfig, base: str | None) -> dict[str, Any]:
    """The settings of a soft prompt; an encoder-decoder has it before its encoder's input."""
    return {
        **_USUAL,
        "base_model_name_or_path": base,
        "num_attention_heads": model.num_heads,
        "num_layers": model.total_layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": tokens,
        "peft_type": "PROMPT_TUNING",
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "task_type": HEAD_TASKS.get(model.head, TASKS[model.family]),
        "token_dim": model.hidden_size,
        "tokenizer_name_or_path": None,
    }


def whole(value: float) -> int | float:
    """PEFT's numbers are whole where they can be."""
    return int(value) if float(value).is_integer() else value


def joined_alpha(lora: LoraConfig, count: int) -> int | float:
    """The alpha of a module of `count` linears, whose rank is that many times theirs: the factor stays the same."""
    return whole(lora.alpha * (math.sqrt(count) if lora.rslora else count))


OTHER_TYPES = {
    "PREFIX_TUNING": "puts keys and values into the attention of every layer",
    "P_TUNING": "makes its prompt with a network of its own",
    "MULTITASK_PROMPT_TUNING": "has a prompt for each of several tasks",
    "IA3": "multiplies activations in place of adding a low-rank update",
    "ADALORA": "has singular values and a rank of its own in every module",
    "LOHA": "multiplies two low-rank products",
    "LOKR": "has Kronecker products",
    "OFT": "rotates weights",
    "BOFT": "rotates weights",
    "VERA": "shares random matrices that are not in the file",
    "XLORA": "mixes several adapters",
    "LN_TUNING": "trains norms only",
}
"""Kinds of adapters that PEFT has and llmtrain has not, and what they do instead."""

_READ = {
    *_USUAL, "alpha_pattern", "rank_pattern", "bias", "fan_in_fan_out", "init_lora_weights", "lora_alpha",
    "lora_dropout", "modules_to_save", "peft_type", "peft_version", "r", "target_modules", "target_parameters",
    "use_rslora", "ensure_weight_tying", "num_attention_heads", "num_layers", "num_transformer_submodules",
    "num_virtual_tokens", "prompt_tuning_init", "prompt_tuning_init_text", "token_dim", "tokenizer_name_or_path",
    "tokenizer_kwargs", "prompt_tuning_init_state_dict_path",
}  # fmt: skip
_SAID_BY_FILES = {
    "layers_to_transform", "layers_pattern", "exclude_modules", "megatron_config", "megatron_core", "runtime_config",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "velora_config",
}  # fmt: skip
"""Keys that say which modules have tensors, or how training began or ran."""
_PLAIN = re.compile(r"\^?\w+(\\?\.\w+)*")
"""The endings of names that are taken for patterns. An expression of a stranger's could run for ever."""
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin that change the base's weights too; the adapter then goes with a base that is nowhere."""


def require_readable(settings: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for adapters of another kind, and for settings that change what an adapter computes."""
    kind = settings.get("peft_type")
    if kind not in ("LORA", "PROMPT_TUNING"):
        if kind is None and "model_type" in settings:
            raise ConfigError(f"{where}: is an adapter of the library `adapters` (AdapterHub), which are only written.")
        why = f": it {OTHER_TYPES[kind]}" if isinstance(kind, str) and kind in OTHER_TYPES else ""
        raise ConfigError(f"{where}: peft_type = {shown(kind)} is not read{why}. LORA and PROMPT_TUNING are.")
    unknown = sorted(settings.keys() - _READ - _SAID_BY_FILES)
    faults = [f"{key} = {shown(settings[key])}" for key in unknown if settings[key]]
    for key in ("rank_pattern", "alpha_pattern"):
        if patterns := settings.get(key):
            plain = isinstance(patterns, dict) and all(_PLAIN.fullmatch(pattern) for pattern in patterns)
            faults += [] if plain else [f"{key} = {shown(patterns)}, which are no plain names of modules"]
    if settings.get("bias", "none") != "none":
        faults.append(f"bias = {shown(settings['bias'])}")
    begin = settings.get("init_lora_weights", True)
    if isinstance(begin, str) and begin.lower().startswith(_CHANGED_BASE):
        faults.append(f"init_lora_weights = {shown(begin)}, which has changed the base's weights")
    if faults:
        raise ConfigError(
            f"{where}: this adapter computes what llmtrain's low-rank updates do not: {'; '.join(faults)}. "
            "Merge it with PEFT (`merge_and_unload`, `save_pretrained`), and import the merged model."
        )


def shown(value: object) -> str:
    return repr(value)[:60]
