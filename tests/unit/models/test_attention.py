"""Every kind with everything that it combines with, against the dense reference, forward and backward."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.config.attention import AttentionConfig
from llmtrain.config.model import ModelConfig
from llmtrain.models import attention_patterns
from llmtrain.models.attention import Attention, AttentionInputs
from llmtrain.models.positions import RelativeBias, build_position_bias
from llmtrain.models.visibility import Visibility
from llmtrain.parallel.draws import Draws, Span, derived_key
from tests.support.samples import tiny_model
from tests.unit.models.dense_attention import (
    KINDS,
    LENGTH,
    SOFTMAX_KINDS,
    dense_mask,
    gradients,
    softmax_attention,
)

SITE = "decoder.0.attention"
BATCH = 2


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks even in short sequences, of which the last is not whole."""
    monkeypatch.setattr(attention_patterns, "QUERY_BLOCK", 7)
    monkeypatch.setattr("llmtrain.models.linear_attention.CHUNK", 7)


def documents() -> Tensor:
    """[B, S]: three documents, the last of them ended by padding; padding first in the other sample."""
    first = [0] * 9 + [1] * 14 + [2] * 12 + [-1] * 5
    second = [-1] * 3 + [0] * 20 + [1] * 17
    return torch.tensor([first, second])


def visibility(causal: bool, restriction: str) -> Visibility:
    """none, documents, padding (of keys only), or a prefix."""
    match restriction:
        case "documents":
            numbers = documents()
            return Visibility(causal, numbers, numbers)
        case "padding":
            return Visibility(causal, None, torch.where(documents() < 0, -1, 0))
        case "prefix":
            return Visibility(causal, prefix_B=torch.tensor([11, 0]))
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


FACTORS: dict[str, tuple[Any, ...]] = {
    "kind": tuple(SOFTMAX_KINDS),
    "causal": (True, False),
    "restriction": ("none", "documents", "padding", "prefix"),
    "kv_heads": (4, 2, 1),
    "position": ("none", "alibi", "t5_relative"),
    "softcap": (None, 2.0),
    "sinks": (False, True),
    "dropout": (0.0, 0.3),
    "scale": (None, 1.0),
}


def pairwise() -> Iterator[Case]:
    """Cases in which every two values of different factors meet; each new case meets as many new pairs as it can."""
    names = list(FACTORS)
    missing = {
        ((a, x), (b, y))
        for i, a in enumerate(names)
        for b in names[i + 1 :]
        for x in FACTORS[a]
        for y in FACTORS[b]
        if {(a, x), (b, y)} != {("causal", False), ("restriction", "prefix")}
    }
    while missing:
        chosen = dict(min(missing, key=repr))
        for name in names:
            if name not in chosen:
                chosen[name] = max(FACTORS[name], key=lambda value: gain(missing, chosen, name, value))
        found = {pair for pair in missing if all(chosen[name] == value for name, value in pair)}
        missing -= found
        yield Case(**chosen)


def gain(missing: set[Any], chosen: dict[str, Any], name: str, value: Any) -> int:
    if {(name, value), *chosen.items()} >= {("causal", False), ("restriction", "prefix")}:
        return -1
    return sum(
        (name, value) in pair
        and all(chosen.get(other, seen) == seen for other, seen in pair if other != name)
        and any(other in chosen for other, _ in pair)
        for pair in missing
    )


PAIRWISE = list(pairwise())


def compared(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """Output and all gradients of our attention, and of the reference."""
    config = case.config
    attention = weighed(Attention(config, SITE).double())
    bias = build_position_bias(config, case.causal)
    if isinstance(bias, RelativeBias):
        bias.double().weight.data.normal_(generator=torch.Generator().manual_seed(5))
    visible = visibility(case.causal, case.restriction)
    draws = Draws.of_micro_batch(0, 1, 0, torch.device("cpu")) if case.dropout else None
    qkv = random_qkv(case.kv_heads)
    wanted = [
        *qkv,
        *([attention.sinks] if case.sinks else []),
        *(bias.parameters() if isinstance(bias, RelativeBias) else []),
    ]
    ours = attention.attend(*qkv, AttentionInputs(None, visible, bias, draws))
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
        dense_mask(config.attention, visible, BATCH, LENGTH, LENGTH),
        scale=case.scale or 8**-0.5,
        softcap=case.softcap,
        bias_NST=None if bias is None else bias.scores(places, places, 0, 4),
        sinks_N=attention.sinks,
        kept_BNST=kept,
    )
    return [ours, *gradients(ours, wanted)], [theirs, *gradients(theirs, wanted)]


@pytest.mark.parametrize("case", PAIRWISE, ids=str)
def test_every_kind_equals_the_dense_reference_forward_and_backward(case: Case) -> None:
    ours, theirs = compared(case)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-6)


def test_the_selection_has_every_pair() -> None:
    assert 20 <= len(PAIRWISE) <= 40
    assert any(case.kind == "bigbird" and not case.causal for case in PAIRWISE)
