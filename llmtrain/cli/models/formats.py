"""What a model can be exported as, and the options that each format has a use for."""

from collections.abc import Iterable
from enum import StrEnum

from llmtrain.errors import ConfigError


class Format(StrEnum):
    """What a model is written as."""

    HF = "hf"
    PEFT = "peft"
    ADAPTERHUB = "adapterhub"
    GGUF = "gguf"
    ONNX = "onnx"
    TORCH_EXPORT = "torch-export"


class Precision(StrEnum):
    """Type of the exported weights."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    Q8_0 = "q8_0"
    INT8 = "int8"
    INT4 = "int4"


ADAPTERS = (Format.PEFT, Format.ADAPTERHUB)
GRAPHS = (Format.ONNX, Format.TORCH_EXPORT)

_PLAIN = (Precision.FLOAT32, Precision.BFLOAT16, Precision.FLOAT16)
PRECISIONS = {
    Format.HF: _PLAIN,
    Format.PEFT: _PLAIN,
    Format.ADAPTERHUB: _PLAIN,
    Format.GGUF: (Precision.FLOAT32, Precision.FLOAT16, Precision.Q8_0),
    Format.ONNX: (Precision.FLOAT32, Precision.FLOAT16, Precision.INT8, Precision.INT4),
    Format.TORCH_EXPORT: _PLAIN,
}

USES = {
    "tokenizer": (Format.HF, Format.GGUF, *GRAPHS),
    "family": (Format.HF, Format.GGUF, *ADAPTERS),
    "max_shard_size": (Format.HF,),
    "proof": (Format.HF,),
    "proof_memory": (Format.HF,),
    "max_rounding": (Format.HF,),
    "max_perplexity_increase": (Format.GGUF, *GRAPHS),
    "base": ADAPTERS,
}
"""Options that not every format has a use for, by the names of the command's parameters."""


def require_use(to: Format, dtype: Precision, given: Iterable[str]) -> None:
    """Raise ConfigError for an option that was given, and has nothing to say about what is written."""
    if dtype not in (allowed := PRECISIONS[to]):
        *names, last = (precision.value for precision in allowed)
        raise ConfigError(f"--dtype {dtype.value}: must be {', '.join(names)} or {last} with --to {to.value}.")
    for name in given:
        if to not in (formats := USES.get(name, tuple(Format))):
            *others, last = (f"--to {form.value}" for form in formats)
            goes = f"{', '.join(others)} and {last}" if others else last
            raise ConfigError(f"--{name.replace('_', '-')}: goes with {goes}; --to {to.value} has no use for it.")
