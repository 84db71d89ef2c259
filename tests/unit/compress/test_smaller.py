"""Models with heads, neurons or layers left out: the numbers of the larger one without them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.compress.importance import ByMagnitude, ByText, Importance, written_squares
from llmtrain.compress.layered import LayeredModel
from llmtrain.compress.smaller import SmallerModel, fewer_parts, iter_blocks, smaller_model
from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import num_parameters
from llmtrain.errors import ConfigError
from llmtrain.interop.name_table import ReadTensor
from llmtrain.models.transformer import Transformer
from llmtrain.values.batch import Batch
from tests.support.samples import tiny_model
from tests.unit.compress.quantized import random_text
from tests.unit.interop.models import BERT, GPT2, LLAMA, T5, random_model, weights_of

GQA = LLAMA.with_keys({"num_heads": 8, "num_kv_heads": 4, "qk_norm": True, "bias": True})
KINDS = ("heads", "ffn", "layers")


def batches(config: ModelConfig) -> list[Batch]:
    return [random_text(config, seed) for seed in (1, 2)]


def left(model: Transformer, kind: str, by_text: bool = False, sparsity: float = 0.5) -> SmallerModel:
    read, config = weights_of(model).read, model.config
    importance: Importance = ByMagnitude(config, read)
    if by_text:
        importance = ByText(LayeredModel(config, read), batches(config), list(iter_blocks(config, kind)))
    return smaller_model(config, fewer_parts(config, kind, sparsity), kind, importance)


def logits(config: ModelConfig, read: ReadTensor, without: frozenset[str] = frozenset()) -> Tensor:
    return LayeredModel(config, read, without=without).logits(batches(config)[0])


SMALLER = [
    pytest.param(config, kind, id=f"{name}-{kind}")
    for name, config in (("llama", GQA), ("gpt2", GPT2), ("bert", BERT), ("t5", T5))
    for kind in KINDS
    if (name, kind) != ("t5", "heads")  # refused below
]


@pytest.mark.parametrize("by_text", [False, True])
@pytest.mark.parametrize(("config", "kind"), SMALLER)
@torch.no_grad()
def test_it_computes_what_the_larger_one_does_without_them(config: ModelConfig, kind: str, by_text: bool) -> None:
    model = random_model(config)
    found, read = left(model, kind, by_text), weights_of(model).read
    assert num_parameters(found.model) < num_parameters(config)
    silenced = found.silenced(read, iter_blocks(config, kind))
    expected = logits(config, silenced, found.left_out)
    torch.testing.assert_close(logits(found.model, found.cut(read)), expected, rtol=1e-4, atol=1e-4)
    written = [block.writes.name for block in iter_blocks(config, kind)]
    for name in written:
        silent = (silenced(name) == 0).all(0)
        assert silent.float().mean() == pytest.approx(0.5, abs=0.05), name
    assert len(found.left_out) == (0 if kind != "layers" else config.total_layers - found.model.total_layers)
    assert not torch.allclose(expected, logits(config, read), atol=1e-3)


@torch.no_grad()
def test_layers_that_write_least_or_turn_least_go() -> None:
    model = random_model(LLAMA.with_keys({"num_layers": 4}))
    for number in ("0", "2"):
        layer = model.decoder.layers[number]  # pyright: ignore[reportOptionalMemberAccess]
        for parameter in (layer.attention.out.weight, layer.mlp.down.weight):  # pyright: ignore
            parameter.mul_(0.0)
    read = weights_of(model).read
    for by_text in (False, True):
        found = left(model, "layers", by_text)
        assert found.model.num_layers == 2
        assert found.origins["decoder.layers.1.mlp.up.weight"][0] == "decoder.layers.3.mlp.up.weight"
        torch.testing.assert_close(logits(found.model, found.cut(read)), logits(model.config, read))


def test_neurons_that_matter_least_go() -> None:
    model = random_model(LLAMA.with_keys({"activation": "relu"}))
    found = left(model, "ffn")
    layer = model.decoder.layers["0"].mlp  # pyright: ignore[reportOptionalMemberAccess]
    scores = layer.up.weight.norm(dim=1) * layer.down.weight.norm(dim=0)  # pyright: ignore
    (kept,) = found.origins["decoder.layers.0.mlp.up.weight"][1].values()
    assert kept.tolist() == scores.topk(40).indices.sort().values.tolist()


@torch.no_grad()
def test_a_text_tells_which_units_write_most() -> None:
    """A neuron with large weights that no text wakes goes, and one with small weights that writes much stays."""
    model = random_model(LLAMA.with_keys({"activation": "relu", "bias": True}))
    mlp = model.decoder.layers["0"].mlp  # pyright: ignore[reportOptionalMemberAccess]
    mlp.up.weight[3] *= 9.0  # pyright: ignore
    mlp.up.bias[3] = -1e4  # pyright: ignore
    by_weights, by_text = (
        left(model, "ffn", which).origins["decoder.layers.0.mlp.up.weight"][1][0] for which in (False, True)
    )
    assert 3 in by_weights.tolist() and 3 not in by_text.tolist()


def test_what_units_write_is_counted_exactly() -> None:
    generator = torch.Generator().manual_seed(4)
    x, weight = torch.randn(50, 12, generator=generator), torch.randn(7, 12, generator=generator)
    found = written_squares(weight, (x.T @ x).double(), 4)
    expected = [(x[:, start : start + 4] @ weight[:, start : start + 4].T).square().sum() for start in (0, 4, 8)]
    torch.testing.assert_close(found.float(), torch.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "keys", "sparsity", "says"),
    [
        ("heads", {"position": "alibi"}, 0.5, "gives each head its own positions"),
        ("heads", {"position": "t5_relative"}, 0.5, "gives each head its own positions"),
        ("heads", {"attention": {"sinks": True}}, 0.5, "belong to heads"),
        ("ffn", {"moe": {"num_experts": 4}}, 0.5, "the model has experts"),
        ("layers", {"moe": {"num_experts": 4, "every_n_layers": 2}}, 0.5, "one layer in 2 has experts"),
        ("heads", {}, 0.1, "leaves all heads"),
        ("layers", {}, 0.1, "leaves all layers"),
        ("ffn", {}, 0.01, "leaves all ffn"),
    ],
)
def test_what_cannot_be_is_refused(kind: str, keys: dict[str, Any], sparsity: float, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        fewer_parts(tiny_model(**keys), kind, sparsity)


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("heads", {"num_heads": 2, "num_kv_heads": 1, "head_dim": 12}),
        ("ffn", {"ffn_hidden_size": 40}),
        ("layers", {"num_layers": 1}),
    ],
)
def test_groups_of_heads_and_whole_rows_stay(kind: str, keys: dict[str, int]) -> None:
    assert fewer_parts(LLAMA, kind, 0.5) == LLAMA.with_keys(keys)
