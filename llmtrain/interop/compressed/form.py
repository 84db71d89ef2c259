"""The section quantization_config of a config.json: what is written there, and what of it llmtrain reads.

compressed-tensors knows much more. What is not in this table is refused by name: read as something else, it would give
other numbers in silence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmtrain.errors import ConfigError
from llmtrain.values.quantization import NumberGrid

METHOD = "compressed-tensors"
KEY = "quantization_config"
PACKED, WHOLE = "pack-quantized", "int-quantized"
"""Formats: several numbers in each int32, for weights alone; a number in each int8, where activations are rounded too.
transformers tells them apart by the activations, whatever the format's name says."""

BITS = (4, 8)
_ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


@dataclass(frozen=True)
class QuantizedForm:
    """How the quantized matrices of a folder lie in it.

    `group` is how many inputs share a scale, None: all. `rounds_inputs`: what goes into the matrices is rounded to
    8 bits as well, each position by itself. `transposed`: matrices lie as [in, out], as GPT-2's do. `dequantize`:
    transformers is told to undo it all when it loads, as its classes cannot compute with it.
    """

    bits: int
    group: int | None
    rounds_inputs: bool = False
    transposed: bool = False
    dequantize: bool = False

    @property
    def format(self) -> str:
        return WHOLE if self.rounds_inputs else PACKED

    @property
    def told(self) -> str:
        """The form in words."""
        scales = "a scale for each output" if self.group is None else f"scales for groups of {self.group} inputs"
        told = f"{self.bits}-bit weights with {scales}"
        return f"{told}; what goes into them is rounded to 8 bits, but in training" if self.rounds_inputs else told

    def grid(self, inputs: int) -> NumberGrid:
        """The grid of a matrix with so many inputs; a group that is larger holds all of them."""
        return NumberGrid(self.bits, None if self.group is None or self.group >= inputs else self.group)

    def to_config(self, ignored: Sequence[str]) -> dict[str, Any]:
        """The section. `ignored` are modules of transformers that stay as they are."""
        weights: dict[str, Any] = {"num_bits": self.bits, "type": "int", "symmetric": True, "dynamic": False}
        if self.transposed:
            weights |= {"strategy": "block", "block_structure": [self.group, 1], "group_size": None}
        else:
            weights |= {"strategy": "channel" if self.group is None else "group", "group_size": self.group}
        group = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": dict(_ACTIVATIONS) if self.rounds_inputs else None,
            "output_activations": None,
        }
        section = {
            "quant_method": METHOD,
            "format": self.format,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(ignored),
        }
        return {**section, "dequantize": True} if self.dequantize else section


def is_of_method(section: Any) -> bool:
    """True for a section that compressed-tensors has written."""
    return isinstance(section, dict) and section.get("quant_method") == METHOD


def read_form(section: Mapping[str, Any], where: str, transposed: bool) -> QuantizedForm:
    """The form that a section names; `transposed`: the family's matrices lie as [in, out].

    Raises ConfigError with everything in it that llmtrain does not read.
    """
    groups = section.get("config_groups")
    group = next(iter(groups.values())) if isinstance(groups, dict) and len(groups) == 1 else None
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(group, dict) or not isinstance(weights, dict):
        raise ConfigError(
            f"{where}: quantization_config.config_groups must be one group with weights: can read models whose "
            "quantized matrices are all of one kind."
        )
    problems = [*_of_section(section, group), *_of_weights(weights, transposed)]
    rounds_inputs = group.get("input_activations") is not None
    format_name = WHOLE if rounds_inputs else PACKED
    for place, found in (("format", section.get("format")), ("config_groups.*.format", group.get("format"))):
        if found != format_name and not (found is None and place != "format"):
            kind = "with" if rounds_inputs else "without"
            problems.append(f"{place} = {found!r:.60}: must be {format_name} {kind} input_activations")
    if problems:
        raise ConfigError(f"{where}: quantization_config cannot be read: {'; '.join(problems)}.")
    size = weights["block_structure"][0] if transposed else weights.get("group_size")
    whole = weights["strategy"] == "channel"
    dequantize = section.get("dequantize") is True
    return QuantizedForm(weights["num_bits"], None if whole else size, rounds_inputs, transposed, dequantize)


def _of_section(section: Mapping[str, Any], group: Mapping[str, Any]) -> list[str]:
    """What of the section and its group is not read."""
    checks = [
        (section.get("quantization_status") == "compressed", "quantization_status", section, "must be compressed"),
        (not section.get("kv_cache_scheme"), "kv_cache_scheme", section, "keys and values are not quantized here"),
        (not section.get("sparsity_config"), "sparsity_config", section, "sparse forms are not read"),
        (not section.get("transform_config"), "transform_config", section, "rotated weights are not read"),
        (group.get("output_activations") is None, "output_activations", group, "must be null"),
    ]
    found = [f"{key} = {place.get(key)!r:.60}: {reason}" for holds, key, place, reason in checks if not holds]
    activations = group.get("input_activations")
    if activations is not None:
        told = activations if isinstance(activations, dict) else {}
        found += [
            f"input_activations.{key} = {told.get(key)!r:.60}: must be {expected}"
            for key, expected in _ACTIVATIONS.items()
            if type(told.get(key)) is not type(expected) or told.get(key) != expected
        ]
    return found


def _of_weights(weights: Mapping[str, Any], transposed: bool) -> list[str]:
    """What of the weights' arguments is not read."""
    bits, size, block = weights.get("num_bits"), weights.get("group_size"), weights.get("block_structure")
    strategy = weights.get("strategy")
    strategies = ("block",) if transposed else ("channel", "group")
    is_size = type(size) is int and 0 < size < 1 << 31
    is_block = isinstance(block, list) and len(block) == 2 and type(block[0]) is int and block[0] > 0 and block[1] == 1
    checks = (
        (type(bits) is int and bits in BITS, "num_bits", "must be 4 or 8"),
        (weights.get("type") == "int", "type", "must be int"),
        (weights.get("symmetric") is True, "symmetric", "must be true"),
        (not weights.get("dynamic"), "dynamic", "must be false"),
        (not weights.get("actorder"), "actorder", "must be null: columns lie in their own order"),
        (strategy in strategies, "strategy", f"must be {' or '.join(strategies)}"),
        (strategy != "group" or is_size, "group_size", "must be a number of inputs"),
        (strategy != "block" or is_block, "block_structure", "must be [inputs, 1]"),
    )
    return [f"weights.{key} = {weights.get(key)!r:.60}: {reason}" for holds, key, reason in checks if not holds]
