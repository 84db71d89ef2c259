"""One-shot zeros: by magnitude those of pruning in training, with a text those of Wanda."""

import pytest
import torch

from llmtrain.compress.layer_inputs import InputSums
from llmtrain.compress.layered import LayeredModel
from llmtrain.compress.zeros import Zeros, choose_zeros, input_norms
from llmtrain.config.model import ModelConfig
from llmtrain.errors import ConfigError
from tests.unit.compress.quantized import random_text
from tests.unit.interop.models import LLAMA, MIXTRAL, T5, random_model, weights_of

NAME, OTHER = "decoder.layers.1.mlp.up.weight", "decoder.layers.1.mlp.down.weight"


@pytest.mark.parametrize(("kind", "share"), [("weights", 0.25), ("2:4", 0.5)])
def test_the_smallest_magnitudes_go(kind: str, share: float) -> None:
    read = weights_of(random_model(LLAMA)).read
    pruned, before = choose_zeros(LLAMA, kind, 0.25, ["attention", "mlp.down"]).cut(read)(NAME), read(NAME)
    zeros = pruned == 0
    assert int(zeros.sum()) == int(share * zeros.numel())
    assert torch.equal(pruned[~zeros], before[~zeros])
    if kind == "2:4":
        groups = before.abs().view(-1, 4)
        assert torch.equal(groups.topk(2).values.sum(1), pruned.abs().view(-1, 4).sum(1))
    else:
        assert before[zeros].abs().max() < before[~zeros].abs().min()
    assert torch.equal(choose_zeros(LLAMA, kind, 0.25, ["mlp.down"]).cut(read)(OTHER), read(OTHER))


@pytest.mark.parametrize("config", [LLAMA, MIXTRAL, T5], ids=["llama", "mixtral", "t5"])
@pytest.mark.parametrize("kind", ["weights", "2:4"])
@torch.no_grad()
def test_wanda_is_that_of_the_paper(kind: str, config: ModelConfig) -> None:
    """Layer after layer: |W| x the norm of the input, of each output the smallest go; the next layer sees that."""
    model, batch = random_model(config), random_text(config)
    read, zeros = weights_of(model).read, choose_zeros(config, kind, 0.3, [])
    found = Zeros(zeros.names, kind, 0.3, input_norms(zeros, LayeredModel(config, read), [batch])).cut(read)
    for name, layer, calls in LayeredModel(config, found).iter_layers([batch]):
        # What goes into the attention of a layer does not depend on its own zeros.
        seen = InputSums(layer)
        dense = {leaf: read(f"{name}.{leaf}") for leaf, _ in layer.named_parameters()}
        for leaf in ("attention.q.weight", "attention.v.weight"):
            for other, parameter in layer.named_parameters():
                parameter.copy_(dense[other])
            seen.gather(calls)
            norms = seen.of(leaf.removesuffix(".weight")).diagonal().sqrt()  # pyright: ignore
            scores = (dense[leaf].abs() * norms).float()
            width = scores.shape[1]
            rows = scores.view(-1, 4) if kind == "2:4" else scores
            count = 2 if kind == "2:4" else int(0.3 * width)
            expected = torch.zeros_like(rows, dtype=torch.bool).scatter_(
                1, rows.topk(count, largest=False).indices, True
            )
            assert torch.equal(found(f"{name}.{leaf}") == 0, expected.view_as(scores)), leaf
        for other, parameter in layer.named_parameters():
            parameter.copy_(found(f"{name}.{other}"))
    experts = [name for name in zeros.names if ".experts." in name]
    assert bool(experts) == (config is MIXTRAL)
    for name in experts:
        zero = found(name) == 0
        share = 0.5 if kind == "2:4" else int(0.3 * zero.shape[-1]) / zero.shape[-1]
        assert (zero.double().mean(-1) - share).abs().max() < 1e-9, "of each output of each expert"
        assert torch.equal(found(name, 2), found(name)[2])


@torch.no_grad()
def test_inputs_that_never_come_go_first_and_experts_without_tokens_go_by_magnitude() -> None:
    weight, norms = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)), torch.ones(8)
    norms[[1, 5]] = 0.0
    zeros = Zeros(frozenset(), "weights", 0.25).pruned(weight, norms)
    assert zeros[:, [1, 5]].all() and int(zeros.sum()) == 8
    by_magnitude = Zeros(frozenset(), "weights", 0.25).pruned(weight, torch.ones(8))
    assert torch.equal(by_magnitude, weight.abs() <= weight.abs().kthvalue(2, 1, keepdim=True).values)


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [("attention.q", ".attention.q."), ("decoder.layers.0.*", ".layers.0."), ("*.down.weight", ".mlp.down.")],
)
def test_what_is_kept_has_no_zeros(pattern: str, meant: str) -> None:
    whole, less = (choose_zeros(LLAMA, "weights", 0.5, keep).names for keep in ((), (pattern,)))
    assert less and whole - less == {name for name in whole if meant in name} != set()


@pytest.mark.parametrize(
    ("kind", "keep", "config", "says"),
    [
        ("weights", ["mpl"], LLAMA, "--keep mpl: fits no linear"),
        ("weights", ["attention", "mlp"], LLAMA, "leaves nothing to prune"),
        ("2:4", ["attention"], LLAMA.with_keys({"ffn_hidden_size": 78}), "groups of 4 inputs, and .*mlp.down has 78"),
    ],
)
def test_what_cannot_be_is_refused(kind: str, keep: list[str], config: ModelConfig, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        choose_zeros(config, kind, 0.5, keep)
