import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from llmtrain.engines.torch_engine import TorchEngine
from llmtrain.errors import CheckpointError
from llmtrain.models.transformer import build_model
from llmtrain.values.batch import IGNORED_LABEL, Batch
from llmtrain.values.fragment import Box, Fragment
from tests.support.samples import hidden_states, random_batch, tiny_model, tiny_run
from tests.support.weights import materialize

CPU = torch.device("cpu")


def engine(model: dict[str, Any] | None = None, train: dict[str, Any] | None = None, **optim: Any) -> TorchEngine:
    return TorchEngine(tiny_run(tiny_model(**(model or {})), train, optim), CPU)


def unequal_batches() -> list[Batch]:
    """Two micro-batches with different numbers of targets."""
    batches = [random_batch(seed=1), random_batch(seed=2)]
    batches[1].labels_BS[:, :20] = IGNORED_LABEL
    return batches


class Fragments:
    """A source that holds an engine's fragments in memory."""

    def __init__(self, fragments: list[Fragment]) -> None:
        self.tensors = {(f.name, f.kind): f.tensor.clone() for f in fragments}

    def read(self, name: str, kind: str, box: Box) -> torch.Tensor:
        return self.tensors[name, kind]

    def global_shape(self, name: str, kind: str) -> tuple[int, ...] | None:
        tensor = self.tensors.get((name, kind))
        return None if tensor is None else tuple(tensor.shape)


def test_training_equals_a_plain_pytorch_loop() -> None:
    """Loss, norm and weights after five steps with clipping, decay and unequal numbers of targets."""
    ours = engine(lr=1e-2, weight_decay=0.1, grad_clip=0.5)
    model = build_model(tiny_model())
    materialize(model, seed=1234, device=CPU)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    batches = unequal_batches()
    for step in range(1, 6):
        result = ours.train_step(step, batches, lr=1e-2)
        losses = []
        for batch in batches:
            logits_BSV = model.logits(hidden_states(model, batch))
            losses.append(F.cross_entropy(logits_BSV.flatten(0, 1), batch.labels_BS.flatten(), reduction="sum"))
        loss = torch.stack(losses).sum() / sum(batch.num_valid_tokens for batch in batches)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        assert result.loss == pytest.approx(loss.item(), rel=1e-6)
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-5)
        assert result.num_tokens == 64 + 24
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours.masters[name], parameter, rtol=1e-4, atol=1e-5)


def test_the_mean_of_micro_batch_means_would_be_wrong() -> None:
    batches = unequal_batches()
    ours = engine()
    losses = [ours.eval_step([batch]) for batch in batches]
    mean_of_means = sum(r.loss_sum / r.num_tokens for r in losses) / 2
    right = engine().train_step(1, batches, 1e-3).loss
    assert right == pytest.approx(sum(r.loss_sum for r in losses) / sum(r.num_tokens for r in losses), rel=1e-6)
    assert abs(mean_of_means - right) > 1e-4


def test_splitting_into_micro_batches_changes_nothing() -> None:
    whole = random_batch(num_samples=4, seed=3)
    tensors = (whole.tokens_BS, whole.positions_BS, whole.labels_BS)
    cut = [[tensor[i : i + 1] for tensor in tensors] for i in range(4)]
    parts = [Batch(tokens, positions, labels_BS=labels) for tokens, positions, labels in cut]
    one, four = engine().train_step(1, [whole], 1e-3), engine().train_step(1, parts, 1e-3)
    assert one.loss == pytest.approx(four.loss, rel=1e-6)
    assert one.grad_norm == pytest.approx(four.grad_norm, rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_same_seed_same_bits(precision: str) -> None:
    def run() -> list[tuple[float, float]]:
        e = engine({"dropout": 0.1, "attention_dropout": 0.1}, {"precision": precision})
        results = [e.train_step(step, [random_batch(seed=step)], 1e-2) for step in range(1, 4)]
        return [(result.loss, result.grad_norm) for result in results]

    assert run() == run()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_follows_fp32_and_weights_are_rounded_masters(precision: str) -> None:
    exact, low = engine(), engine(train={"precision": precision})
    for step in range(1, 11):
        batch = random_batch(seed=step % 3)
        a, b = exact.train_step(step, [batch], 1e-2), low.train_step(step, [batch], 1e-2)
        assert b.loss == pytest.approx(a.loss, rel=0.02)
    for name, parameter in low.model.named_parameters():
        assert low.masters[name].dtype == torch.float32
        assert torch.equal(parameter, low.masters[name].to(parameter.dtype)), name
        assert parameter.grad is None


def test_gradients_of_micro_batches_add_up_in_fp32() -> None:
    """Many tiny gradients beside a large one: added in bf16 they would vanish."""
    low = engine(train={"precision": "bf16"})
    parameter, master = low.model.decoder.final_norm.weight, low.masters["decoder.final_norm.weight"]  # type: ignore[union-attr]
    for value in (1.0, *[2.0**-10] * 64):
        (parameter * value).sum().backward()
    assert master.grad is not None
    assert torch.equal(master.grad, torch.full_like(master, 1 + 64 * 2.0**-10))


def test_a_step_that_is_not_finite_changes_nothing_but_the_scale() -> None:
    e = engine(train={"precision": "fp16"}, loss_scale={"initial": 65536.0, "growth_interval": 2})
    e.train_step(1, [random_batch()], 1e-2)
    before = {(f.name, f.kind): f.tensor.clone() for f in e.fragments()}
    state = e.state()
    with torch.no_grad():
        e.model.embeddings.word.weight[5] = float("inf")
    tokens = random_batch().tokens_BS.clone()
    tokens[0, 0] = 5
    poisoned = replace(random_batch(), tokens_BS=tokens)
    result = e.train_step(2, [poisoned], 1e-2)
    assert result.skipped
    assert e.state()["updates"] == state["updates"] == 1
    assert e.state()["loss_scale"] == {"scale": 32768.0, "good_steps": 0}
    for fragment in e.fragments():
        assert torch.equal(fragment.tensor, before[fragment.name, fragment.kind]), fragment.name


def test_fp16_recovers_from_an_overflow_by_lowering_the_scale() -> None:
    e = engine(train={"precision": "fp16"}, loss_scale={"initial": 2.0**40})
    results = [e.train_step(step, [random_batch()], 1e-2) for step in range(1, 41)]
    assert results[0].skipped
    assert not results[-1].skipped
    assert e.state()["updates"] == sum(not result.skipped for result in results)
    assert results[-1].loss < results[0].loss or math.isnan(results[0].loss)


def test_restoring_fragments_and_state_continues_bit_for_bit() -> None:
    settings: dict[str, Any] = {"train": {"precision": "fp16"}, "loss_scale": {"growth_interval": 2}}
    first = engine(**settings)
    for step in (1, 2, 3):
        first.train_step(step, [random_batch(seed=step)], 1e-2)
    second = engine(**settings)
    second.load(Fragments(list(first.fragments())))
    second.load_state(first.state())
    for step in (4, 5, 6):
        batch = [random_batch(seed=step)]
        assert first.train_step(step, batch, 1e-2) == second.train_step(step, batch, 1e-2)
    for a, b in zip(first.fragments(), second.fragments(), strict=True):
        assert torch.equal(a.tensor, b.tensor), a.name


@pytest.mark.parametrize("forgotten", ["state", "exp_avg", "exp_avg_sq"])
def test_a_resume_that_forgets_something_is_seen(forgotten: str) -> None:
    first, second = engine(), engine()
    for step in (1, 2, 3):
        first.train_step(step, [random_batch(seed=step)], 1e-2)
    source = Fragments(list(first.fragments()))
    for name, kind in source.tensors:
        if kind == forgotten:
            source.tensors[name, kind].zero_()
    second.load(source)
    if forgotten != "state":
        second.load_state(first.state())
    batches = [[random_batch(seed=step)] for step in (4, 5)]
    ours = [first.train_step(step, batch, 1e-2) for step, batch in enumerate(batches, 4)]
    theirs = [second.train_step(step, batch, 1e-2) for step, batch in enumerate(batches, 4)]
    assert ours[0] == theirs[0]
    assert ours[1] != theirs[1]


def test_only_fp16_has_a_loss_scale() -> None:
    scaled = {name: engine(train={"precision": name}).loss_scale is not None for name in ("fp32", "bf16", "fp16")}
    assert scaled == {"fp32": False, "bf16": False, "fp16": True}


def test_a_checkpoint_of_another_shape_is_refused() -> None:
    source = Fragments(list(engine({"ffn_hidden_size": 64}).fragments()))
    with pytest.raises(CheckpointError, match=r"decoder\.layers\.0\.mlp\.gate\.weight: the model needs shape"):
        engine().load(source)


def test_a_tiny_model_memorizes_a_text() -> None:
    text = b"Every weight, gradient, moment and draw has a layout-free global coordinate."
    ids = torch.tensor([list(text)])
    batch = Batch(ids[:, :-1], torch.arange(len(text) - 1)[None], labels_BS=ids[:, 1:])
    e = engine({"max_seq_len": 128})
    losses = [e.train_step(step, [batch], 1e-2).loss for step in range(1, 101)]
    assert losses[0] > 5
    assert losses[-1] < 0.05


@pytest.mark.whole_grid
def test_compiled_layers_give_the_same_numbers() -> None:
    model = {"num_layers": 1, "dropout": 0.1}
    plain, compiled = engine(model), engine(model, {"compile": True})
    for step in (1, 2):
        batch = [random_batch(seed=step)]
        a, b = plain.train_step(step, batch, 1e-3), compiled.train_step(step, batch, 1e-3)
        assert b.loss == pytest.approx(a.loss, rel=1e-5)
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-4)


class Operations(TorchDispatchMode):
    """Counts what reaches the device: one kernel each, but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_bf16_gradients_are_added_to_fp32_ones_without_a_copy() -> None:
    ours = engine(train={"precision": "bf16"})
    parameter, master = next(iter(ours.parameters.values())), next(iter(ours.masters.values()))
    grads = [torch.randn(parameter.shape).bfloat16() for _ in range(3)]
    with Operations() as counted:
        for grad in grads:
            parameter.grad = None
            (parameter * grad).sum().backward()
    assert torch.equal(master.grad, sum((grad.float() for grad in grads[1:]), grads[0].float()))
    assert counted.names["_to_copy"] == 1, "of the first alone"


def test_all_weights_are_rounded_together() -> None:
    ours = engine(train={"precision": "bf16"})
    for master in ours.masters.values():
        master.mul_(1.7)
    with Operations() as counted:
        ours.round_weights()
    assert counted.names == {"_foreach_copy_": 1}
    assert all(torch.equal(ours.parameters[name], master.bfloat16()) for name, master in ours.masters.items())


def test_clipping_in_the_update_is_no_pass_of_its_own() -> None:
    """On a GPU. tests/parity/test_gpu_choices.py compares the numbers."""
    passes = []
    for in_update in (False, True):
        ours = engine(lr=1e-2, grad_clip=0.1)
        assert not ours.clips_in_update, "on a CPU the bits stay what they were"
        ours.clips_in_update = in_update
        with Operations() as operations:
            assert ours.train_step(1, unequal_batches(), 1e-2).grad_norm > 0.1
        passes.append(operations.names["_foreach_mul_"])
    assert passes == [1, 0]


def test_gradients_are_gone_after_a_step() -> None:
    ours: Any = engine()
    grads: list[StorageWeakRef] = []
    update = ours.update

    def note_and_update() -> None:
        grads.extend(StorageWeakRef(master.grad.untyped_storage()) for master in next(ours.resident()))
        update()

    ours.update = note_and_update
    ours.train_step(1, [random_batch(seed=1)], 1e-3)
    assert len(grads) == len(ours.masters)
    assert all(grad.expired() for grad in grads)


def test_garbage_is_collected_at_every_fiftieth_step(monkeypatch: pytest.MonkeyPatch) -> None:
    collected = []
    monkeypatch.setattr("gc.collect", lambda generation=2: collected.append(generation))
    ours = engine()
    for step in (49, 50, 51, 100):
        ours.train_step(step, [random_batch(seed=1)], 1e-3)
    assert collected == [1, 1]


class Waits(TorchFunctionMode):
    """Counts the calls for which the host waits for the device. What was fetched once lies on the host."""

    CALLS = ("item", "tolist", "cpu", "numpy", "nonzero", "bincount", "__bool__", "__int__", "__float__", "__index__")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        on_host = any(getattr(arg, "on_host", False) for arg in args if isinstance(arg, torch.Tensor))
        if func.__name__ in self.CALLS and not on_host:
            self.found.append(func.__name__)
            if func.__name__ == "cpu":
                out = out.clone()
                out.on_host = True
        elif on_host:
            for part in out if isinstance(out, tuple | list) else (out,):
                if isinstance(part, torch.Tensor):
                    part.on_host = True
        return out


@pytest.mark.parametrize("moe", [None, {"num_experts": 4, "ffn_hidden_size": 16}], ids=["dense", "experts"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_host_waits_once_in_a_step(precision: str, moe: dict[str, Any] | None, monkeypatch: Any) -> None:
    monkeypatch.setattr("llmtrain.models.experts.mixture.runs_grouped", lambda x_PH: x_PH.dtype == torch.bfloat16)
    ours = engine({"moe": moe} if moe else {}, train={"precision": precision})
    micro_batches = [random_batch(seed=1), random_batch(seed=2)]
    tokens = sum(batch.num_valid_tokens for batch in micro_batches)
    monkeypatch.setattr(Batch, "num_valid_tokens", tokens // 2)  # counted by the host, in tensors of the host
    ours.train_step(1, micro_batches, 1e-3)
    with Waits() as waits:
        result = ours.train_step(2, micro_batches, 1e-3)
    assert math.isfinite(result.loss)
    layers = 2 * 2 if moe and precision == "fp32" else 0  # no kernel for all experts: a wait for each layer and batch
    assert waits.found.count("cpu") == 1
    assert len(waits.found) == 1 + layers, waits.found
