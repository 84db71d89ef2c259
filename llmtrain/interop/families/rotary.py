"""Rotary positions in Hugging Face's configurations: `rope_parameters`, both ways, and its older spelling."""

from collections.abc import Mapping
from math import log
from typing import Any

from llmtrain.config.attention import RopeScaling
from llmtrain.config.model import ModelConfig
from llmtrain.errors import ConfigError

KINDS = ("default", "linear", "yarn", "llama3")
_NUMBERS = (
    "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor", "attention_factor",
    "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor", "mscale", "mscale_all_dim",
)  # fmt: skip
_LARGEST = 1e12


def rope_parameters(model: ModelConfig) -> dict[str, Any]:
    """The parameters from which transformers computes the same angles."""
    scaling = model.rope_scaling
    if scaling is None or scaling.kind == "ntk":
        return {"rope_type": "default", "rope_theta": stretched_theta(model)}
    found = {"rope_type": scaling.kind, "rope_theta": model.rope_theta, "factor": scaling.factor}
    match scaling.kind:
        case "linear":
            return found
        case "yarn":
            found |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
            if scaling.attention_factor is not None:
                found["attention_factor"] = scaling.attention_factor
        case "llama3":
            found |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    return found | {"original_max_position_embeddings": scaling.original_max_seq_len}


def older_rope_keys(parameters: dict[str, Any]) -> dict[str, Any]:
    """The same for transformers 4 and what follows it, which know no `rope_parameters`: without these keys they take
    their class's theta and no scaling, and say nothing."""
    # theta stands within too: CTranslate2 looks for it there and nowhere else.
    scaled = parameters["rope_type"] != "default"
    return {"rope_theta": parameters["rope_theta"], "rope_scaling": dict(parameters) if scaled else None}


def stretched_theta(model: ModelConfig) -> float:
    """The base of the frequencies: transformers has no name for ntk, but a larger base is all that it is."""
    scaling, size = model.rope_scaling, model.head_size
    if scaling is None or scaling.kind != "ntk" or size <= 2:
        return model.rope_theta
    return model.rope_theta * scaling.factor ** (size / (size - 2))


def rope_fields(config: Any) -> tuple[dict[str, Any], list[str]]:
    """The fields of a ModelConfig, and what llmtrain cannot express."""
    rope = _known_kinds(config.rope_parameters or {})
    kind = rope.get("rope_type", "default")
    checks = (
        (kind in KINDS, f"rope_type {kind}, not {', '.join(KINDS)}"),
        (rope.get("partial_rotary_factor", 1.0) == 1.0, "partial_rotary_factor other than 1"),
        (kind != "yarn" or rope.get("truncate", True), "truncate false in yarn"),
    )
    # transformers' classes have a theta of their own where the file says none.
    theta = float(rope.get("rope_theta") or getattr(config, "default_theta", 10000.0))
    fields = {"position": "rope", "rope_theta": theta, "rope_scaling": _scaling(kind, rope, config)}
    return fields, [reason for holds, reason in checks if not holds]


def require_one_spelling(content: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError where the older keys of a config.json say other positions than `rope_parameters`: transformers
    4 reads the ones, what follows it the other, and a folder would be two models."""
    newer = content.get("rope_parameters")
    if not isinstance(newer, Mapping):
        return
    pairs = [("rope_theta", content.get("rope_theta"), newer.get("rope_theta"))]
    if "rope_scaling" in content:
        older = content["rope_scaling"] if isinstance(content["rope_scaling"], Mapping) else {}
        kind = older.get("rope_type", older.get("type", "default"))
        pairs.append(("rope_scaling.rope_type", kind, newer.get("rope_type", "default")))
        pairs += [(f"rope_scaling.{key}", value, newer[key]) for key, value in older.items() if key in newer]
    for key, one, other in pairs:
        if one is not None and other is not None and one != other:
            raise ConfigError(
                f"{where}: {key} = {_short(one)}, but rope_parameters has {_short(other)}: transformers 4 reads the "
                "one, 5 the other. Make them equal, or remove the one that training did not use."
            )


def _known_kinds(parameters: Any) -> dict[str, Any]:
    """The parameters, each of the kind of value that it must have. Raises ConfigError: transformers looks at the other
    keys of a config.json only."""
    if not isinstance(parameters, Mapping):
        raise ConfigError(f"config.json: rope_parameters = {_short(parameters)}: must be an object.")
    for key, value in parameters.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _LARGEST
        if key in _NUMBERS and value is not None and not is_number:
            raise ConfigError(
                f"config.json: rope_parameters.{key} = {_short(value)}: must be a number from 0 to {_LARGEST:g}."
            )
    if not isinstance(kind := parameters.get("rope_type", ""), str):
        raise ConfigError(f"config.json: rope_parameters.rope_type = {_short(kind)}: must be a name.")
    return dict(parameters)


def _short(value: Any) -> str:
    return repr(value)[:60]


def _scaling(kind: str, rope: dict[str, Any], config: Any) -> dict[str, Any] | None:
    if kind not in KINDS or kind == "default":
        return None
    longest = config.max_position_embeddings
    original = int(rope.get("original_max_position_embeddings") or longest)
    factor = float(rope.get("factor") or longest / original)
    found: dict[str, Any] = {"kind": kind, "factor": factor}
    if kind == "yarn":
        found |= {"beta_fast": float(rope.get("beta_fast") or 32), "beta_slow": float(rope.get("beta_slow") or 1)}
        found["attention_factor"] = _attention_factor(rope, factor)
    if kind == "llama3":
        names = ("low_freq_factor", "high_freq_factor")
        found |= {name: float(rope.get(name) or RopeScaling.model_fields[name].default) for name in names}
    return found if kind == "linear" else found | {"original_max_seq_len": original}


def _attention_factor(rope: dict[str, Any], factor: float) -> float | None:
    """DeepSeek's two keys give it as a quotient; None: what follows from the factor alone."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    one, other = rope.get("mscale"), rope.get("mscale_all_dim")
    if not one or not other or factor <= 1:
        return None
    return (0.1 * one * log(factor) + 1) / (0.1 * other * log(factor) + 1)
