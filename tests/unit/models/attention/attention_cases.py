"""Attention modules with known weights, under every visibility, and what the dense reference says of them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmtrain.config.attention import AttentionConfig
from llmtrain.config.model import ModelConfig
from llmtrain.models.attention.multi_head import Attention, AttentionInputs
from llmtrain.models.attention.scoring import Visibility
from llmtrain.models.positions import RelativeBias, build_position_bias
from llmtrain.parallel.stateless_random import Draws, Span
from llmtrain.values.keyed_hash import derived_key
from tests.support.samples import tiny_model
from tests.unit.models.attention.dense_attention import KINDS, LENGTH, dense_mask, gradients, softmax_attention

SITE = "decoder.0.attention"
BATCH = 2


def documents() -> Tensor:
    """[B, S]: three documents, the last of them ended by padding; padding first in the other sample."""
    first = [0] * 9 + [1] * 14 + [2] * 12 + [-1] * 5
    second = [-1] * 3 + [0] * 20 + [1] * 17
    return torch.tensor([first, second])


def visibility(causal: bool, restriction: str, device: str = "cpu") -> Visibility:
    """none, documents, padding (of keys only), or a prefix."""
    match restriction:
        case "documents":
            numbers = documents().to(device)
            return Visibility(causal, numbers, numbers)
        case "padding":
            return Visibility(causal, None, torch.where(documents() < 0, -1, 0).to(device))
        case "prefix":
            return Visibility(causal, prefix_B=torch.tensor([11, 0], device=device))
        case _:
            return Visibility(causal)


def weighed(attention: Attention, seed: int = 0) -> Attention:
    generator = torch.Generator().manual_seed(seed)
    for parameter in attention.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.3
    return attention


def built(dtype: torch.dtype = torch.float64, cross: bool = False, **changes: Any) -> Attention:
    return weighed(Attention(tiny_model(**changes), SITE, cross=cross).to(dtype))


def random_qkv(
    num_kv_heads: int, num_queries: int = LENGTH, num_keys: int = LENGTH, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((num_queries, BATCH, 4, 8), (num_keys, BATCH, num_kv_heads, 8), (num_keys, BATCH, num_kv_heads, 8))
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


@dataclass(frozen=True)
class Case:
    kind: str
    causal: bool = True
    restriction: str = "none"
    kv_heads: int = 4
    position: str = "none"
    softcap: float | None = None
    sinks: bool = False
    dropout: float = 0.0
    scale: float | None = None

    def __str__(self) -> str:
        return "-".join(str(value) for value in vars(self).values())

    @property
    def config(self) -> ModelConfig:
        attention = {**KINDS[self.kind], "softcap": self.softcap, "sinks": self.sinks, "scale": self.scale}
        return tiny_model(
            num_kv_heads=self.kv_heads,
            position=self.position,
            attention_dropout=self.dropout,
            relative_buckets=8,
            relative_max_distance=20,
            attention=AttentionConfig(**attention),
        )


@dataclass(frozen=True)
class Built:
    """An attention with all that it needs; `qkv` and `weights` are what gradients are wanted of."""

    attention: Attention
    inputs: AttentionInputs
    qkv: list[Tensor]

    @property
    def weights(self) -> list[Tensor]:
        sinks, bias = self.attention.sinks, self.inputs.bias
        return [*([] if sinks is None else [sinks]), *(bias.parameters() if isinstance(bias, RelativeBias) else [])]


def build(case: Case) -> Built:
    config = case.config
    attention = weighed(Attention(config, SITE).double())
    bias = build_position_bias(config, case.causal)
    if isinstance(bias, RelativeBias):
        bias.double().weight.data.normal_(generator=torch.Generator().manual_seed(5))
    draws = Draws.of_micro_batch(0, 1, 0, torch.device("cpu")) if case.dropout else None
    inputs = AttentionInputs(None, visibility(case.causal, case.restriction), bias, draws)
    return Built(attention, inputs, random_qkv(case.kv_heads))


def compared(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """Output and all gradients of our attention, and of the reference."""
    case_built = build(case)
    attention, inputs, qkv = case_built.attention, case_built.inputs, case_built.qkv
    visible, bias, draws = inputs.visible, inputs.bias, inputs.draws
    wanted = [*qkv, *case_built.weights]
    ours = attention.attend(*qkv, inputs)
    places = torch.arange(LENGTH)
    kept = None
    if draws is not None:
        shape = (BATCH, 4, LENGTH, LENGTH)
        keep = draws.keep_mask(
            derived_key(SITE, "probabilities"), case.dropout, shape, [Span(0, size) for size in shape]
        )
        kept = keep / (1 - case.dropout)
    theirs = softmax_attention(
        (qkv[0], qkv[1], qkv[2]),
        dense_mask(case.config.attention, visible, BATCH, LENGTH, LENGTH),
        scale=case.scale or 8**-0.5,
        softcap=case.softcap,
        bias_NST=None if bias is None else bias.scores(places, places, 0, 4),
        sinks_N=attention.sinks,
        kept_BNST=kept,
    )
    return [ours, *gradients(ours, wanted)], [theirs, *gradients(theirs, wanted)]
