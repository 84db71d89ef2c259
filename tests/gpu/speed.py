"""Fast: what the device can do at best, and what attention and the head make of it, beside peers."""

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from llmtrain.models.attention.flex_kernel import flex_kernel
from llmtrain.models.attention.multi_head import fused_attention
from llmtrain.models.attention.patterns import Full
from llmtrain.models.attention.scoring import Scoring, Visibility
from llmtrain.models.head import Objective, head_cross_entropy
from llmtrain.parallel.parts import VocabularyPart
from tests.gpu.session import Finding, Machine, attempts

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}

GPU_BACKENDS = ("cudnn", "efficient")

GEMM_SIZES = ((4096, 4096), (4096, 14336), (14336, 4096), (8192, 8192), (8192, 28672), (16384, 16384), (2048, 2048))
"""(in, out) of the linears of models from 1 to 405 billion weights, whole and divided over tensor ranks."""


def ceilings(machine: Machine) -> Iterator[Finding]:
    """A large product, a copy, and the table of products that a planner interpolates in."""
    size = machine.sized(8192, 64)
    yield gemm(machine, size, size, size, "product at best")
    source = torch.empty(machine.sized(1 << 30, 1 << 16), dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    seconds = machine.seconds(lambda: target.copy_(source))
    yield Finding("copy, read and written", "ok", 2 * source.numel() / seconds / 1e9, "GB/s")
    for rows in (1024, 2048, 4096, 8192, 16384):
        for inner, outer in GEMM_SIZES:
            if not machine.tiny or rows == 1024:
                shape = tuple(n if not machine.tiny else n // 128 for n in (rows, inner, outer))
                yield gemm(machine, *shape, "product")


def gemm(machine: Machine, rows: int, inner: int, outer: int, name: str) -> Finding:
    a = torch.randn(rows, inner, device=machine.device, dtype=torch.bfloat16)
    b = torch.randn(outer, inner, device=machine.device, dtype=torch.bfloat16)
    seconds = machine.seconds(lambda: a @ b.T, repeats=5, warm_up=2)
    return Finding(f"{name} {rows} x {inner} x {outer}", "ok", 2 * rows * inner * outer / seconds / 1e12, "TFLOP/s")


def attention(machine: Machine) -> Iterator[Finding]:
    """Forward and backward of one layer, at the shapes of an 8B model and of GPT-2, with documents too."""
    for batch, length, heads, kv_heads, width in ((1, 8192, 32, 8, 128), (64, 1024, 12, 12, 64)):
        if machine.tiny:
            batch, length, heads, kv_heads, width = 1, 128, 4, max(1, kv_heads * 4 // heads), 16
        shape = f"{batch} x {length}, {heads}/{kv_heads} x {width}"
        flop = 3.5 * 4 * batch * heads * width * length * length / 2  # backward 2.5 times forward; half is masked
        sizes = ((length, batch, n, width) for n in (heads, kv_heads, kv_heads))
        qkv = [torch.randn(s, device=machine.device, dtype=torch.bfloat16, requires_grad=True) for s in sizes]
        work: dict[str, Callable[[], Finding]] = {}
        plain = Scoring(Full(), Visibility(), width**-0.5)
        for name, backend in BACKENDS.items():
            title = f"attention {shape}, {name}"
            if name in GPU_BACKENDS and not machine.on_gpu:
                yield Finding(title, "left out", note="not there on a CPU")
            elif name != "math" or machine.tiny:  # of long sequences it keeps all scores
                work[title] = partial(timed, machine, title, partial(with_backend, backend, plain), qkv, flop)
        documents = (torch.arange(length, device=machine.device) // (length // 4)).expand(batch, -1)
        packed = Scoring(Full(), Visibility(True, documents, documents), width**-0.5)
        title = f"attention {shape}, four documents, by a mask"
        work[title] = partial(timed, machine, title, partial(fused_attention, scoring=packed), qkv, flop / 4)
        if machine.on_gpu:
            for name, scoring, share in (("flex", plain, 1), ("four documents, flex", packed, 4)):
                title = f"attention {shape}, {name}"
                work[title] = partial(timed, machine, title, partial(flex_kernel, scoring=scoring), qkv, flop / share)
        else:
            yield Finding(f"attention {shape}, flex", "left out", note="it has no backward pass on a CPU")
        yield from attempts(work)


def with_backend(backend: SDPBackend, scoring: Scoring, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel([backend]):
        return fused_attention(q, k, v, scoring)


def timed(machine: Machine, title: str, kernel: Callable[..., Tensor], qkv: list[Tensor], flop: float) -> Finding:
    def both() -> None:
        torch.autograd.grad(kernel(*qkv).float().sum(), qkv)

    seconds = machine.seconds(both, repeats=5, warm_up=2)
    return Finding(title, "ok", flop / seconds / 1e12, "TFLOP/s", f"{1e3 * seconds:.3g} ms")


def head(machine: Machine) -> Iterator[Finding]:
    """The head and its loss, forward and backward, by size of the chunks, and peers."""
    tokens, width = machine.sized(16384, 64), machine.sized(4096, 32)
    for vocabulary in (machine.sized(50_304, 512), machine.sized(128_256, 1024)):
        hidden = torch.randn(tokens, width, device=machine.device, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(vocabulary, width, device=machine.device, dtype=torch.bfloat16).mul_(0.02).requires_grad_()
        labels = torch.randint(vocabulary, (tokens,), device=machine.device)
        losses: dict[str, Callable[[], Tensor]] = {}
        for chunk in (1024, 4096, 8192):
            chunk_tokens = machine.sized(chunk, chunk // 128)
            objective = Objective(1 / tokens, chunk_tokens, VocabularyPart(0, vocabulary))
            losses[f"chunks of {chunk}"] = partial(chunked, hidden, weight, labels, objective)
        losses["F.cross_entropy of all logits"] = partial(plain, hidden, weight, labels)
        if hasattr(F, "linear_cross_entropy"):
            losses["F.linear_cross_entropy"] = partial(F.linear_cross_entropy, hidden, weight, labels)
        if find_spec("liger_kernel") and machine.on_gpu:
            losses["Liger"] = partial(liger, hidden, weight, labels)
        titles = {f"head, vocabulary {vocabulary:,}, {name}": loss for name, loss in losses.items()}
        inputs = [hidden, weight]
        yield from attempts({title: partial(cost, machine, title, loss, inputs) for title, loss in titles.items()})


def chunked(hidden: Tensor, weight: Tensor, labels: Tensor, objective: Objective) -> Tensor:
    return head_cross_entropy(hidden, weight, labels, objective)[0]


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), labels)


def liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, labels)


def cost(machine: Machine, title: str, loss: Callable[[], Tensor], inputs: list[Tensor]) -> Finding:
    def both() -> None:
        torch.autograd.grad(loss(), inputs)

    seconds = machine.seconds(both, repeats=5, warm_up=2)
    return Finding(title, "ok", 1e3 * seconds, "ms", f"peak {machine.peak_bytes(both) / 1e9:.3g} GB")
