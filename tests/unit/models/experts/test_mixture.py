"""Experts against a slow reference that runs every expert on every token."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from llmtrain.models.experts.mixture import MoE, Pairs, grouped_linear
from llmtrain.parallel.stateless_random import Draws
from tests.support.samples import tiny_model

DRAWS = Draws.of_micro_batch(0, 1, 0, torch.device("cpu"))

KINDS: list[dict[str, Any]] = [
    {"router": "switch", "capacity_factor": 1.0},
    {"router": "top_k", "top_k": 2},
    {"router": "top_k", "top_k": 3, "capacity_factor": 0.5, "normalize_weights": False},
    {"router": "expert_choice", "top_k": 2},
    {"router": "top_k", "num_shared_experts": 2, "ffn_hidden_size": 24},
]


def built(settings: dict[str, Any], **model: Any) -> MoE:
    moe = MoE(tiny_model(moe={"num_experts": 4, **settings}, **model), "decoder.0.moe")
    generator = torch.Generator().manual_seed(2)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return moe


def hidden() -> Tensor:
    return torch.randn(7, 3, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()


def slow(moe: MoE, x_SBH: Tensor) -> Tensor:
    """Every expert on every token, times its weight."""
    routing, experts = moe.router(x_SBH, None, DRAWS), moe.experts
    total = torch.zeros_like(x_SBH) if moe.shared is None else moe.shared(x_SBH)
    for number in range(4):
        inner = moe.experts.pointwise(x_SBH @ (experts.up if experts.gate is None else experts.gate)[number].T)
        if experts.gate is not None:
            inner = inner * (x_SBH @ experts.up[number].T)
        total = total + routing.weights_sBE[..., number, None] * (inner @ experts.down[number].T)
    return total


def gradients(moe: MoE, x_SBH: Tensor, out_SBH: Tensor) -> list[Tensor]:
    weight = torch.randn(out_SBH.shape, generator=torch.Generator().manual_seed(4))
    inputs = [x_SBH, *moe.parameters()]
    found = torch.autograd.grad((out_SBH * weight).sum(), inputs, allow_unused=True)
    return [torch.zeros_like(of) if grad is None else grad for grad, of in zip(found, inputs, strict=True)]


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
@pytest.mark.parametrize("settings", KINDS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_output_and_gradients_equal_the_slow_reference(settings: dict[str, Any], activation: str) -> None:
    moe, x_SBH = built(settings, activation=activation), hidden()
    ours, theirs = moe(x_SBH, None, DRAWS, 0.0)[0], slow(moe, x_SBH)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(gradients(moe, x_SBH, ours), gradients(moe, x_SBH, theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", KINDS[:4], ids=lambda settings: "-".join(map(str, settings.values())))
def test_permuting_experts_changes_nothing(settings: dict[str, Any]) -> None:
    moe, order = built(settings), torch.tensor([2, 0, 3, 1])
    before = moe(hidden(), None, DRAWS, 0.0)[0]
    with torch.no_grad():
        for parameter in (moe.router.weight, *moe.experts.parameters()):
            parameter.copy_(parameter[order])
    torch.testing.assert_close(moe(hidden(), None, DRAWS, 0.0)[0], before)


def test_dropped_tokens_pass_through_as_zeros() -> None:
    moe = built({"router": "switch", "capacity_factor": 0.25})
    out_SBH, report = moe(hidden(), None, DRAWS, 0.0)
    chosen_SB = moe.router(hidden(), None, DRAWS).chosen_SBE.any(-1)
    assert report[1] > 0
    assert not out_SBH[~chosen_SB].any()
    assert out_SBH[chosen_SB].any(-1).all()


def test_balancing_losses_join_the_backward_pass_with_their_factor() -> None:
    grads = []
    for coeff, factor in ((0.0, 1.0), (0.5, 0.0), (0.5, 2.0), (1.0, 1.0)):
        moe, x_SBH = built({"aux_loss_coeff": coeff}), hidden()
        moe(x_SBH, None, DRAWS, factor)[0].sum().backward()
        assert moe.router.weight.grad is not None
        grads.append(moe.router.weight.grad)
    assert torch.equal(grads[0], grads[1])
    torch.testing.assert_close(grads[2], grads[3])
    assert not torch.allclose(grads[0], grads[2])


def test_an_expert_without_tokens_has_a_gradient_of_zeros() -> None:
    weight = torch.randn(3, 5, 4, requires_grad=True)
    grouped_linear(torch.randn(6, 4), weight, [4, 0, 2]).sum().backward()
    assert weight.grad is not None
    assert not weight.grad[1].any()
    assert weight.grad[0].any()
    assert weight.grad[2].any()
    assert grouped_linear(torch.randn(0, 4), weight, [0, 0, 0]).shape == (0, 5)


def test_pairs_lie_by_expert_and_sum_by_token() -> None:
    chosen = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 1], [1, 0, 0]], dtype=torch.bool)
    pairs = Pairs.of(chosen, None)
    assert pairs.expert_P.tolist() == [0, 0, 1, 1, 2]
    assert pairs.token_P.tolist() == [0, 3, 0, 2, 2]
    rows = torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0]])
    assert pairs.summed(rows).flatten().tolist() == [5.0, 0.0, 24.0, 2.0]


def test_pairs_are_the_same_where_their_number_is_known() -> None:
    best = torch.rand(20, 6, generator=torch.Generator().manual_seed(1)).argsort(-1)[:, :2]
    chosen = torch.zeros(20, 6, dtype=torch.bool).scatter_(1, best, True)
    counted, known = Pairs.of(chosen, None), Pairs.of(chosen, 2)
    assert all(torch.equal(a, b) for a, b in zip(counted[:3], known[:3], strict=True))
    assert counted[3:] == known[3:]


@pytest.mark.parametrize("moe", [{"router": "top_k", "top_k": 2}, {"router": "switch"}], ids=str)
def test_nobody_waits_for_a_device_where_no_choice_is_dropped(
    moe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor without content: whoever asks for a number of it fails. Forward and backward, as on a GPU in bf16."""
    monkeypatch.setattr("llmtrain.models.experts.mixture.runs_grouped", lambda x_PH: True)

    def forward_and_backward(moe: dict[str, Any], valid_BS: torch.Tensor | None = None) -> None:
        layer = MoE(tiny_model(moe={"num_experts": 4, "ffn_hidden_size": 16, **moe}), "site").train()
        for module in layer.modules():  # `to` cannot change the type of a tensor without content
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(torch.empty_like(parameter, dtype=torch.bfloat16)))
        x_SBH = torch.empty(8, 2, 32, dtype=torch.bfloat16, requires_grad=True)
        out_SBH, _ = layer(x_SBH, valid_BS, Draws(torch.zeros((), dtype=torch.int64)), 0.5)
        (out_SBH * torch.empty_like(out_SBH)).sum().backward()

    with FakeTensorMode(allow_non_fake_inputs=True):
        forward_and_backward(moe)
        for waits in ({**moe, "capacity_factor": 1.0}, moe):
            valid_BS = torch.empty(2, 8, dtype=torch.bool) if waits is moe else None
            with pytest.raises(DataDependentOutputException):
                forward_and_backward(waits, valid_BS)


def test_one_kernel_for_all_experts_equals_one_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = built({"ffn_hidden_size": 16}).bfloat16().train()
    results = []
    for grouped in (False, True):
        monkeypatch.setattr("llmtrain.models.experts.mixture.runs_grouped", lambda x_PH, grouped=grouped: grouped)
        x_SBH = hidden().bfloat16().detach().requires_grad_()
        results.append(gradients(layer, x_SBH, layer(x_SBH, None, DRAWS, 0.0)[0]))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-2)


def test_recomputed_activations_give_the_same_bits() -> None:
    config = tiny_model(moe={"num_experts": 4})
    plain, again = MoE(config, "site"), MoE(config, "site", recompute="selective")
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(5))
    again.load_state_dict(plain.state_dict())
    results = []
    for moe in (plain, again):
        x_SBH = hidden()
        results.append(gradients(moe.train(), x_SBH, moe(x_SBH, None, DRAWS, 0.0)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
