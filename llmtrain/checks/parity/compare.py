"""Does a layout compute what one process computes? Real ranks, a shrunk model, every number compared.

A trace is what some steps leave behind: the weights before the first, loss, norm and every gradient of each, the
weights after the last, an evaluation. The reference is the trace of the torch engine in one process; the trace of a
layout is put together from its ranks' fragments by their global coordinates.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from llmtrain.checks.parity.batches import probe_batches
from llmtrain.checks.parity.layouts import Candidate
from llmtrain.checks.parity.rank_pool import Forks, RankError
from llmtrain.config.engines import ENGINES
from llmtrain.config.schema import RunConfig
from llmtrain.parallel.layout import plan_layout
from llmtrain.train.setup import engine_class
from llmtrain.values.fragment import Box, Fragment, tiling_problem
from llmtrain.values.progress import DISTILL_LOSS, EvalResult, StepResult

PRELOADED = ("llmtrain.checks.parity.compare", *(row.module for row in ENGINES.values()))
"""Modules that take long to import."""

Pieces = list[tuple[str, tuple[int, ...], Box, np.ndarray]]
"""(name, shape of the whole tensor, box, data) of fragments, fit to be sent between processes."""

Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class RankTrace:
    """One rank's part of a trace. `gradients` has an entry per step."""

    steps: list[StepResult]
    initial: Pieces
    gradients: list[Pieces]
    final: Pieces
    evaluation: EvalResult


@dataclass(frozen=True)
class Trace:
    """Whole tensors by global name, and what each step reported."""

    steps: list[StepResult]
    initial: Tensors
    gradients: list[Tensors]
    final: Tensors
    evaluation: EvalResult


def trace_rank(build: Callable[..., Any], config: RunConfig, num_steps: int, data: tuple[int, int]) -> RankTrace:
    """Run some steps on this rank. `data` is its data-parallel (rank, size)."""
    engine = build(config, torch.device("cpu"))
    gradients: list[Pieces] = []
    engine.inspect_gradients = lambda fragments: gradients.append(pieces(fragments))
    initial = pieces(fragment for fragment in engine.fragments() if fragment.kind == "master")
    steps = [
        engine.train_step(step, probe_batches(config, step, *data), config.optim.lr) for step in range(1, num_steps + 1)
    ]
    final = pieces(fragment for fragment in engine.fragments() if fragment.kind == "master")
    return RankTrace(steps, initial, gradients, final, engine.eval_step(probe_batches(config, 0, *data)))


def pieces(fragments: Iterable[Fragment]) -> Pieces:
    """Copies of fragments."""
    # The next step changes the tensors in place, and what is compared travels to another process.
    return [(f.name, f.global_shape, f.box, f.tensor.detach().cpu().float().numpy().copy()) for f in fragments]


def assemble(parts: Sequence[Pieces]) -> Tensors:
    """Whole tensors from all ranks' pieces. Raises ValueError where an element is missing or held twice."""
    boxes: dict[str, list[Box]] = {}
    whole: Tensors = {}
    for name, shape, box, data in (piece for part in parts for piece in part):
        boxes.setdefault(name, []).append(box)
        whole.setdefault(name, np.zeros(shape, np.float32))[box.slices_in(Box.whole(shape))] = data
    for name, held in boxes.items():
        problem = tiling_problem(whole[name].shape, held)
        if problem:
            raise ValueError(f"{name}: {problem}")
    return whole


def assemble_trace(ranks: Sequence[RankTrace]) -> Trace:
    """The trace of a layout. Loss and norm are rank 0's."""
    return Trace(
        steps=ranks[0].steps,
        initial=assemble([rank.initial for rank in ranks]),
        gradients=[assemble(parts) for parts in zip(*(rank.gradients for rank in ranks), strict=True)],
        final=assemble([rank.final for rank in ranks]),
        evaluation=ranks[0].evaluation,
    )


@dataclass(frozen=True)
class Levels:
    """The parity levels of a precision: how far each number may differ, relative.

    Of a tensor, the norm of the difference over its own norm; a tensor whose norm is below `floor` of all tensors' must
    only stay below it (a key's bias has no true gradient: what is left of it is noise). Weights have a wider
    level: Adam divides each gradient by its own size, and so turns the rounding of a small one into a visible step.
    """

    first_loss: float = 1e-6
    loss: float = 1e-5
    grad_norm: float = 1e-5
    gradient: float = 1e-5
    weight: float = 1e-4
    experts: float = 1e-4
    floor: float = 1e-6


FP32 = Levels()
LOW_PRECISION = Levels(first_loss=1e-3, loss=1e-2, grad_norm=3e-2, gradient=0.1, weight=0.1, experts=0.1, floor=1e-3)
"""bf16 and fp16: sums in another order round to neighbouring numbers of 8 or 11 bits, and Adam passes that on."""


def levels_of(config: RunConfig) -> Levels:
    """The levels of a run. Activations that are rounded to 8 bits are of low precision, whatever type they have."""
    rounds_inputs = config.quantize is not None and config.quantize.numbers.rounds_inputs
    return LOW_PRECISION if rounds_inputs or config.train.precision != "fp32" else FP32


@dataclass
class Verdict:
    """How far a layout is from the reference; `problems` says in words what is too far, the first cause first."""

    first_loss: float = 0.0
    loss: float = 0.0
    grad_norm: float = 0.0
    gradient: float = 0.0
    weight: float = 0.0
    experts: float = 0.0
    problems: list[str] = field(default_factory=list)


def compare(reference: Trace, other: Trace, levels: Levels) -> Verdict:
    """Compare a layout's trace with the reference's, in the order in which one thing causes another."""
    verdict = Verdict()
    for name, value in reference.initial.items():
        if name not in other.initial or not np.array_equal(value, other.initial[name]):
            verdict.problems.append(f"weights before the first step differ, first in {name}")
            break
    relative = [abs(b.loss - a.loss) / abs(a.loss) for a, b in zip(reference.steps, other.steps, strict=True)]
    verdict.first_loss, verdict.loss = relative[0], max(relative, key=_size)
    _judge(verdict, "loss of step 1", verdict.first_loss, levels.first_loss)
    made = _made_steps(reference, other, verdict)
    for step in made:
        name, error = worst_tensor(reference.gradients[step], other.gradients[step], levels.floor)
        verdict.gradient = max(verdict.gradient, error, key=_size)
        if step == made[0]:
            _judge(verdict, f"gradient of {name} in step {step + 1}", error, levels.gradient)
    norms = [(reference.steps[step].grad_norm, other.steps[step].grad_norm) for step in made]
    verdict.grad_norm = max((abs(after - before) / before for before, after in norms), key=_size, default=0.0)
    _judge(verdict, "gradient norm", verdict.grad_norm, levels.grad_norm)
    _judge(verdict, "loss", verdict.loss, levels.loss)
    noise = noise_tensors(reference, levels.floor)
    trained = {name: value for name, value in reference.final.items() if name not in noise}
    name, verdict.weight = worst_tensor(trained, other.final, levels.floor)
    _judge(verdict, f"weights of {name} after the last step", verdict.weight, levels.weight)
    for step, (a, b) in enumerate(zip(reference.steps, other.steps, strict=True), start=1):
        name, error = worst_metric(a.metrics, b.metrics)
        verdict.experts = max(verdict.experts, error)
        _judge(verdict, f"{name} of step {step}", error, levels.experts)
    if [a.num_tokens for a in reference.steps] != [b.num_tokens for b in other.steps]:
        verdict.problems.append("numbers of valid tokens differ")
    before, after = (trace.evaluation.loss_sum / trace.evaluation.num_tokens for trace in (reference, other))
    _judge(verdict, "loss of the evaluation", abs(after - before) / before, levels.loss)
    counts = (reference.evaluation.counts, other.evaluation.counts)
    apart = sum(abs(b - a) for a, b in zip(*counts, strict=True)) / max(1.0, sum(counts[0]))
    _judge(verdict, "counts of the evaluation", apart, levels.experts)
    return verdict


def _made_steps(reference: Trace, other: Trace, verdict: Verdict) -> list[int]:
    """The steps, from 0, whose gradients can be compared: those that not both have skipped, as fp16 does at first."""
    pairs = [(a.skipped, b.skipped) for a, b in zip(reference.steps, other.steps, strict=True)]
    for step, (before, after) in enumerate(pairs, start=1):
        if before != after:
            verdict.problems.append(f"step {step} is skipped in {'one process' if before else 'this layout'} only")
            break
    if all(before and after for before, after in pairs):
        verdict.problems.append(
            f"nothing is compared: each of the {len(pairs)} steps was skipped, as no gradient was finite. Give more "
            "--steps, or lower optim.loss_scale.initial"
        )
    return [step for step, pair in enumerate(pairs) if not all(pair)]


def _size(error: float) -> float:
    """The key that errors are ordered by: NaN, which is neither smaller nor larger, is worse than any number."""
    return math.inf if math.isnan(error) else error


def worst_metric(reference: Mapping[str, float], other: Mapping[str, float]) -> tuple[str, float]:
    """The metric of experts or of a teacher that differs most, and by how much, relative; a missing one differs by
    infinity."""
    errors = [("metrics", 0.0)]
    for name in reference:
        if name.startswith("moe/") or name == DISTILL_LOSS:
            apart = abs(reference[name] - other.get(name, float("inf")))
            errors.append((name, apart / max(abs(reference[name]), 1e-3)))
    return max(errors, key=lambda found: _size(found[1]))


def noise_tensors(reference: Trace, floor: float) -> set[str]:
    """Tensors whose gradient was never more than noise: Adam makes full steps of it, in any direction.

    Keys' biases are such: adding the same to all scores of a query changes no softmax.
    """
    made = [at for step, at in zip(reference.steps, reference.gradients, strict=True) if not step.skipped]
    names = set(reference.final) if made else set()
    for gradients in made:
        least = _least(gradients, floor)
        names &= {name for name, value in gradients.items() if np.linalg.norm(value.ravel()) < least}
    return names


def _judge(verdict: Verdict, what: str, error: float, allowed: float) -> None:
    if not error <= allowed:  # NaN is too far as well
        verdict.problems.append(f"{what} differs by {error:.1e}, allowed is {allowed:.0e}")


def worst_tensor(reference: Tensors, other: Tensors, floor: float) -> tuple[str, float]:
    """The name and the relative error of the tensor that differs most; a missing one differs by infinity."""
    return max(_errors(reference, other, _least(reference, floor)), key=lambda found: _size(found[1]))


def _least(tensors: Tensors, floor: float) -> float:
    """The norm below which a tensor counts as noise beside the others."""
    return floor * float(np.sqrt(sum(float(np.square(value, dtype=np.float64).sum()) for value in tensors.values())))


def _errors(reference: Tensors, other: Tensors, least: float) -> Iterator[tuple[str, float]]:
    for name, value in reference.items():
        if name not in other:
            yield name, float("inf")
            continue
        difference = float(np.linalg.norm((value.astype(np.float64) - other[name]).ravel()))
        norm = float(np.linalg.norm(value.ravel()))
        # What is noise beside the others (keys' biases have no true gradient) is only bounded.
        yield name, difference / norm if norm >= least else 0.0 if difference <= least else difference / least


COLUMNS = ("layout", "ranks", "loss 1", "loss", "norm", "gradient", "weights", "seconds", "numbers")


@dataclass(frozen=True)
class Comparison:
    """One layout beside the reference."""

    name: str
    world_size: int
    seconds: float
    verdict: Verdict

    def row(self) -> list[str]:
        """The figures under COLUMNS; where something is too far, what."""
        errors = (getattr(self.verdict, name) for name in ("first_loss", "loss", "grad_norm", "gradient", "weight"))
        mark = f"DIFFERENT: {'; '.join(self.verdict.problems)}" if self.verdict.problems else "equal"
        return [self.name, str(self.world_size), *(f"{error:.0e}" for error in errors), f"{self.seconds:.1f}", mark]

    def to_json(self) -> dict[str, Any]:
        return {"layout": self.name, "ranks": self.world_size, "seconds": self.seconds, **asdict(self.verdict)}


def compare_layouts(config: RunConfig, candidates: Sequence[Candidate], num_steps: int) -> Iterator[Comparison]:
    """Run each candidate on ranks of its own and compare it with the torch engine in one process."""
    levels = levels_of(config)
    forks = Forks(PRELOADED)
    reference = assemble_trace(forks.run(trace_layout, 1, config, num_steps))
    for candidate in candidates:
        began = time.monotonic()
        try:
            ranks = forks.run(trace_layout, candidate.world_size, candidate.config, num_steps)
            verdict = compare(reference, assemble_trace(ranks), levels)
        except (RankError, ValueError) as error:
            verdict = Verdict(problems=[str(error)])
        yield Comparison(candidate.name, candidate.world_size, time.monotonic() - began, verdict)


def trace_layout(rank: int, world_size: int, config: RunConfig, num_steps: int) -> RankTrace:
    """The trace of one rank of a layout. Called on each rank, in a group of all of them."""
    layout = plan_layout(config.parallel, world_size)
    data = (layout.coordinates(rank).data, layout.data)
    return trace_rank(engine_class(config.engine.name), config, num_steps, data)
