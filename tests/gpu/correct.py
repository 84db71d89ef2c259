"""Right: what a device computes beside what the CPU computes."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llmtrain.engines.torch_engine import TorchEngine
from llmtrain.models.attention import flex_kernel
from llmtrain.models.attention.fused_blocks import flash, flash_gradients
from llmtrain.models.attention.ring import summed_heads
from llmtrain.models.experts import mixture
from llmtrain.models.stack import Pass
from llmtrain.models.transformer import build_model
from llmtrain.parallel.stateless_random import Draws
from llmtrain.values.batch import Batch
from llmtrain.values.fragment import Box, Fragment
from tests.gpu.session import Finding, Machine, attempts, checked
from tests.support.samples import random_batch, tiny_model, tiny_run
from tests.support.weights import materialize
from tests.unit.models.attention.test_flex_kernel import CASES, Case, ours_and_theirs

CPU = torch.device("cpu")
STEPS = 20

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2 with dropout": {
        "position": "learned",
        "norm": "layernorm",
        "activation": "gelu",
        "bias": True,
        "dropout": 0.1,
    },
    "experts": {"moe": {"num_experts": 4, "ffn_hidden_size": 64}},
    "window": {"attention": {"kind": "sliding_window", "window": 9}},
}


SIZES_OF_FP8 = {"head_dim": 16, "ffn_hidden_size": 96}
"""Every product of them is one of multiples of 16."""


class Kept:
    """A source that holds fragments in memory."""

    def __init__(self, fragments: list[Fragment]) -> None:
        self.tensors = {(f.name, f.kind): f.tensor.detach().cpu().clone() for f in fragments}

    def read(self, name: str, kind: str, box: Box) -> Tensor:
        return self.tensors[name, kind]

    def global_shape(self, name: str, kind: str) -> tuple[int, ...] | None:
        found = self.tensors.get((name, kind))
        return None if found is None else tuple(found.shape)


def section(machine: Machine) -> Iterator[Finding]:
    checks: dict[str, Callable[[], Finding]] = {}
    for name, model in MODELS.items():
        for precision, bound in (("fp32", 1e-5), ("bf16", 3e-2)):
            title = f"{STEPS} steps, {name}, {precision}, beside fp32 on the CPU"
            checks[title] = partial(losses, title, machine, model, precision, bound)
    title = f"{STEPS} steps, llama, fp8, beside fp32 on the CPU"
    if find_spec("torchao"):
        checks[title] = partial(losses, title, machine, SIZES_OF_FP8, "fp8", 5e-2)
    else:
        yield Finding(title, "left out", note="torchao is not installed")
    for case in CASES:
        checks[f"flex {case}"] = partial(attention, machine, case)
    checks |= {
        "blocks of a ring": partial(blocks, machine),
        "one product for all experts": partial(experts, machine),
        "a step that is not finite": partial(skipped, machine),
        "saved and loaded": partial(saved_and_loaded, machine),
        "compiled": partial(compiled, machine),
    }
    yield from attempts(checks)


def train(device: torch.device, model: dict[str, Any], train: dict[str, Any], steps: int = STEPS) -> list[float]:
    engine = TorchEngine(tiny_run(tiny_model(**model), train), device)
    return [engine.train_step(step, batches(step), 1e-3).loss for step in range(1, steps + 1)]


def batches(step: int) -> list[Batch]:
    return [random_batch(seed=2 * step), random_batch(seed=2 * step + 1)]


def losses(title: str, machine: Machine, model: dict[str, Any], precision: str, bound: float) -> Finding:
    steps = machine.sized(STEPS, 3)
    ours = train(machine.device, model, {"precision": precision, "compile": False}, steps)
    theirs = train(CPU, model, {"precision": "fp32"}, steps)
    return checked(title, max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True)), bound)


def attention(machine: Machine, case: Case) -> Finding:
    """FlexAttention beside the dense reference in fp64; backward too on a GPU, where alone it has that."""
    from torch.nn.attention.flex_attention import flex_attention

    if machine.on_gpu:
        results = ours_and_theirs(case, torch.float32, "cuda")
    else:  # not compiled: that takes a minute
        with mock.patch.object(flex_kernel, "compiled_flex_attention", lambda: flex_attention):
            results = ours_and_theirs(case, torch.float32)
    half = len(results) // 2
    pairs = zip(results[:half], results[half:], strict=True)
    error = max(difference(ours, theirs) for ours, theirs in pairs)
    return checked(f"flex {case}", error, 2e-2 if machine.on_gpu else 1e-4)


def blocks(machine: Machine) -> Finding:
    """Flash attention to keys in two blocks, joined by their log-sums, beside both at once in fp64; fewer key heads."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 8, 128, 64), (2, 2, 256, 64), (2, 2, 256, 64), (2, 8, 128, 64))
    given = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    q, k, v = (x.double().requires_grad_() for x in given[:3])
    # Queries are the last half of the positions: they see the first block, and of the second what is not behind them.
    seen = torch.ones(128, 256, dtype=torch.bool).tril(128)
    theirs = scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    expected = [theirs.detach(), *torch.autograd.grad(theirs, (q, k, v), given[3].double())]
    q, k, v, grad_out = (x.to(machine.device) for x in given)
    if not machine.on_gpu:
        k, v = (x.repeat_interleave(4, dim=1) for x in (k, v))
    parts = [(slice(0, 128), False), (slice(128, 256), True)]
    found = [flash(q, k[:, :, keys], v[:, :, keys], is_causal, 0.125) for keys, is_causal in parts]
    log_sum = torch.logaddexp(found[0][1], found[1][1])
    out = sum(torch.exp(part_sum - log_sum)[..., None] * part for part, part_sum in found)
    assert isinstance(out, Tensor)
    out = out.bfloat16()
    grads = [
        flash_gradients(grad_out, (q, k[:, :, keys], v[:, :, keys], out, log_sum), is_causal, 0.125)
        for keys, is_causal in parts
    ]
    grad_q = grads[0][0].float() + grads[1][0].float()
    grad_k, grad_v = (summed_heads(torch.cat([part[n] for part in grads], 2), 2).permute(1, 2, 0, 3) for n in (1, 2))
    pairs = zip((out, grad_q, grad_k, grad_v), expected, strict=True)
    error = max(difference(ours.cpu(), reference) for ours, reference in pairs)
    return checked("blocks of a ring, joined, beside all keys at once", error, 2e-2)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    ours, theirs = ours.double(), theirs.double()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))


def experts(machine: Machine) -> Finding:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 32, generator=generator).bfloat16().to(machine.device)
    weight = torch.randn(4, 48, 32, generator=generator).bfloat16().to(machine.device)
    counts = torch.tensor([20, 0, 43, 1], device=machine.device)
    grouped = mixture.grouped_linear(x, weight, counts.cumsum(0).to(torch.int32))
    looped = mixture.grouped_linear(x, weight, counts.tolist())
    return checked("one product for all experts, beside one for each", difference(grouped, looped), 1e-2)


def skipped(machine: Machine) -> Finding:
    engine = TorchEngine(tiny_run(train={"compile": False}), machine.device)
    before = {name: weight.detach().clone() for name, weight in engine.masters.items()}
    hook = next(iter(engine.masters.values())).register_hook(lambda grad: grad * math.inf)
    result = engine.train_step(1, batches(1), 1e-3)
    hook.remove()
    unchanged = all(torch.equal(before[name], weight) for name, weight in engine.masters.items())
    right = result.skipped and unchanged and not engine.train_step(2, batches(2), 1e-3).skipped
    return Finding("a step that is not finite changes nothing", "ok" if right else "wrong")


def saved_and_loaded(machine: Machine) -> Finding:
    """The next step of an engine that has loaded what another one has saved."""
    config = tiny_run(train={"precision": "bf16", "compile": False})
    first, second = TorchEngine(config, machine.device), TorchEngine(config, machine.device)
    first.train_step(1, batches(1), 1e-3)
    second.load(Kept(list(first.fragments())))
    second.load_state(first.state())
    losses = [engine.train_step(2, batches(2), 1e-3).loss for engine in (first, second)]
    same = all(torch.equal(a.tensor, b.tensor) for a, b in zip(first.fragments(), second.fragments(), strict=True))
    state = "ok" if losses[0] == losses[1] and same else "wrong"
    return Finding("saved, loaded, a step: the same bits", state, abs(losses[0] - losses[1]))


def compiled(machine: Machine) -> Finding:
    """Twelve layers with dropout are one graph, and compute what they compute uncompiled."""
    from torch._dynamo.utils import counters

    config = tiny_model(num_layers=12, dropout=0.1)
    results = []
    for backend in (None, "inductor" if machine.on_gpu else "aot_eager"):
        torch._dynamo.reset()
        counters.clear()
        model = build_model(config)
        materialize(model, seed=1, device=machine.device)
        model.to(machine.device).train()
        if backend:
            for stack in model.stacks:
                for layer in stack.layers.values():
                    layer.compile(backend=backend)
        draws = Draws.of_micro_batch(1, 1, 0, machine.device)
        hidden, _ = model(random_batch(seed=1).to(machine.device), Pass(draws))
        hidden.square().mean().backward()
        results.append([hidden, *(p.grad for p in model.parameters() if p.grad is not None)])
    graphs = counters["stats"]["unique_graphs"]
    error = max(difference(ours, theirs) for theirs, ours in zip(*results, strict=True))
    state = "ok" if graphs == 1 and error < 1e-3 else "wrong"
    return Finding("12 layers with dropout, compiled", state, error, "", f"{graphs} graphs, 1 is right; at most 0.001")
