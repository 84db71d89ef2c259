"""Tiny models whose linears are in whole numbers, as if a quantized folder had been found."""

from dataclasses import dataclass, replace

from torch import Tensor

from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import iter_linears
from llmtrain.infer.model import FoundModel
from llmtrain.infer.packed.choice import StoredMatrices
from llmtrain.interop.compressed.choice import SCHEMES
from llmtrain.values.fragment import Box
from llmtrain.values.quantization import Quantized, round_to_nearest
from tests.unit.interop.models import GPT2, LLAMA, MIXTRAL, T5, random_model

SIZES = {"hidden_size": 64, "ffn_hidden_size": 96}
"""That groups of 32 divide."""
ALL_EXPERTS = {"moe": MIXTRAL.moe.with_keys({"top_k": MIXTRAL.moe.num_experts})} if MIXTRAL.moe else {}
"""Which of them are chosen may hang on a last bit: with all of them logits can be compared."""
MODELS = {
    "llama": LLAMA.with_keys(SIZES),
    "gpt2": GPT2.with_keys(SIZES),
    "mixtral": MIXTRAL.with_keys({**SIZES, **ALL_EXPERTS}),
    "mixtral top 2": MIXTRAL.with_keys(SIZES),
    "t5": T5.with_keys(SIZES),
}
GROUP = 32


@dataclass(frozen=True)
class Weights:
    """A `FragmentSource` in memory."""

    tensors: dict[str, Tensor]

    def read(self, name: str, kind: str, box: Box) -> Tensor:
        tensor = self.tensors[name]
        for dim, (start, size) in enumerate(zip(box.offsets, box.shape, strict=True)):
            tensor = tensor.narrow(dim, start, size)
        return tensor.clone()

    def global_shape(self, name: str, kind: str) -> tuple[int, ...] | None:
        return tuple(self.tensors[name].shape) if name in self.tensors else None


def found_model(config: ModelConfig, scheme: str, group: int | None = GROUP) -> FoundModel:
    """A model of random weights, all of whose linears are quantized; w4a16 has the group."""
    form = replace(SCHEMES[scheme], group=group if scheme == "w4a16" else None)
    tensors = {name: parameter.detach() for name, parameter in random_model(config).named_parameters()}
    stored = dict[tuple[str, int | None], Quantized]()
    for _, weight in iter_linears(config):
        whole = tensors[weight.name]
        for expert in range(weight.shape[0]) if weight.expert else (None,):
            matrix = whole if expert is None else whole[expert]
            stored[weight.name, expert] = made = round_to_nearest(matrix, form.grid(weight.shape[-1]))
            matrix.copy_(made.dequantized())
    names = frozenset(name for name, _ in stored)
    rounded = frozenset(name.removesuffix(".weight") for name in names) if form.rounds_inputs else frozenset[str]()
    matrices = StoredMatrices(form, names, lambda name, expert=None: stored[name, expert])
    return FoundModel(config, Weights(tensors), rounded=rounded, matrices=matrices)
