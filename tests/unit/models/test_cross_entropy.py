import pytest
import torch
import torch.nn.functional as F

from llmtrain.models.head import Objective, head_cross_entropy
from llmtrain.parallel.parts import VocabularyPart


def objective_of(scale: float, chunk_tokens: int, vocab_size: int) -> Objective:
    return Objective(scale, chunk_tokens, VocabularyPart(0, vocab_size))


def case(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(37, 8, dtype=dtype).requires_grad_()
    weight = torch.randn(11, 8, dtype=dtype).requires_grad_()
    labels = torch.randint(0, 11, (37,))
    labels[[0, 5, 36]] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("chunk_tokens", [1, 8, 37, 100])
def test_loss_and_gradients_equal_pytorchs(chunk_tokens: int) -> None:
    hidden, weight, labels = case(torch.float32)
    objective, loss_sum = head_cross_entropy(hidden, weight, labels, objective_of(0.25, chunk_tokens, 11))
    grads = torch.autograd.grad(objective, (hidden, weight))
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    expected_grads = torch.autograd.grad(expected * 0.25, (hidden, weight))
    torch.testing.assert_close(loss_sum, expected.detach())
    torch.testing.assert_close(objective, expected * 0.25)
    for grad, reference in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, reference)


def test_no_targets_is_a_loss_of_zero_and_no_gradient() -> None:
    hidden, weight, labels = case(torch.float32)
    objective, loss_sum = head_cross_entropy(hidden, weight, torch.full_like(labels, -100), objective_of(1.0, 8, 11))
    grads = torch.autograd.grad(objective, (hidden, weight))
    assert loss_sum == 0
    assert all(not grad.any() for grad in grads)


def test_fp32_logits_of_all_tokens_never_exist() -> None:
    """The largest tensor that the call makes is a chunk's logits: every operation that it dispatches is watched."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.numel = max(self.numel, out.numel())
            return out

    hidden, weight = torch.randn(256, 8, requires_grad=True), torch.randn(512, 8, requires_grad=True)
    with Largest() as largest:
        head_cross_entropy(hidden, weight, torch.randint(0, 512, (256,)), objective_of(1.0, 32, 512))[0].backward()
    assert largest.numel == 32 * 512


def test_fp16_gradients_are_scaled_before_they_are_rounded() -> None:
    """Each gradient is around 1e-7, below what fp16 holds: they survive only because the scale comes first."""
    torch.manual_seed(0)
    hidden = (torch.randn(16, 8) * 1e-2).half().requires_grad_()
    weight = (torch.randn(4096, 8) * 1e-2).half().requires_grad_()
    labels = torch.randint(0, 4096, (16,))
    objective, _ = head_cross_entropy(hidden, weight, labels, objective_of(1024.0, 8, 4096))
    grad = torch.autograd.grad(objective, weight)[0].float() / 1024
    exact_hidden, exact_weight = hidden.detach().float(), weight.detach().float().requires_grad_()
    loss = F.cross_entropy(exact_hidden @ exact_weight.T, labels, reduction="sum")
    exact = torch.autograd.grad(loss, exact_weight)[0]
    torch.testing.assert_close(grad, exact, rtol=0.02, atol=1e-8)


def test_one_chunk_makes_no_fp32_sum_and_the_same_bits() -> None:
    """The second chunk here has no targets: the fp32 sum that it makes necessary is of one chunk and of zeros."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sums(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.found += isinstance(out, torch.Tensor) and out.shape == (96, 8) and out.dtype == torch.float32
            return out

    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 8).bfloat16(), torch.randn(96, 8).bfloat16()
    labels = torch.randint(0, 96, (64,))
    labels[32:] = -100
    grads, counts = [], []
    for tokens in (32, 64):
        rows, matrix = hidden[:tokens].clone().requires_grad_(), weight.clone().requires_grad_()
        with Sums() as sums:
            head_cross_entropy(rows, matrix, labels[:tokens], objective_of(0.5, 32, 96))[0].backward()
        grads.append(matrix.grad)
        counts.append(sums.found)
    assert counts[0] == 0 < counts[1]
    assert torch.equal(grads[0], grads[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_passes_of_a_gpu_and_those_of_a_cpu_agree(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for one_pass in (False, True):
        monkeypatch.setattr("llmtrain.parallel.parts.makes_one_pass", lambda logits, chosen=one_pass: chosen)
        hidden, weight, labels = case(dtype)
        objective, loss_sum = head_cross_entropy(hidden, weight, labels, objective_of(0.25, 8, 11))
        results.append((loss_sum, *torch.autograd.grad(objective, (hidden, weight))))
    for cpu, gpu in zip(*results, strict=True):
        torch.testing.assert_close(cpu, gpu)
