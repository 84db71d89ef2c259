"""Names of activations in Hugging Face's configurations."""

from collections.abc import Mapping
from typing import Any

from llmtrain.config.model import ModelConfig

Names = Mapping[str, Mapping[str, Any]]
"""Fields of a ModelConfig by the name on the other side; of several names for one function the first is written."""

PLAIN: Names = {
    "gelu_new": {"activation": "gelu", "gelu_approximate": "tanh"},
    "gelu_pytorch_tanh": {"activation": "gelu", "gelu_approximate": "tanh"},
    "gelu": {"activation": "gelu", "gelu_approximate": "none"},
    "relu": {"activation": "relu"},
}

GATED: Names = {
    "gated-gelu": {"activation": "geglu", "gelu_approximate": "tanh"},
    "gated-gelu_new": {"activation": "geglu", "gelu_approximate": "tanh"},
    "gated-silu": {"activation": "swiglu"},
    "gated-relu": {"activation": "reglu"},
}
"""T5's `feed_forward_proj`; its "gated-gelu" is the approximation by tanh."""


def activation_name(model: ModelConfig, names: Names) -> str:
    """The name of a model's activation; the first of the names where it has none there."""
    wanted = {"activation": model.activation, "gelu_approximate": model.gelu_approximate}
    fitting = (name for name, fields in names.items() if fields.items() <= wanted.items())
    return next(fitting, next(iter(names)))
