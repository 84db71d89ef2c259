"""Saving a run in one layout and continuing it in another, and saying where the two differ."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from launch.rank.rendezvous import TorchRankStore
from llmtrain.checkpoint.manager import CheckpointManager
from llmtrain.checkpoint.reader import CheckpointReader, open_checkpoint
from llmtrain.checks.parity.compare import Pieces, Tensors, assemble, pieces
from llmtrain.checks.parity.layouts import build_candidate, iter_candidates, short_name
from llmtrain.config.budget import Budget
from llmtrain.config.data import SourceConfig, SpecialTokensConfig
from llmtrain.config.engines import ENGINES
from llmtrain.config.parameters import parameter_shapes
from llmtrain.config.rules.arithmetic import arithmetic_problems
from llmtrain.config.schema import CheckpointConfig, RunConfig
from llmtrain.finetune.base_weights import BaseWeights
from llmtrain.models.init import InitialWeights
from llmtrain.optim.schedule import learning_rate
from llmtrain.parallel.layout import plan_layout
from llmtrain.preflight.resolve import resolve
from llmtrain.train.setup import build_loader, engine_class
from llmtrain.train.state import Saving, TrainState, restore, saved_state
from llmtrain.values.fragment import Box, Fragment
from llmtrain.values.precision import DTYPES
from llmtrain.values.progress import StepResult
from tests.parity.cases import GRID_STEPS, finetune_run, parity_run
from tests.parity.test_deepspeed import small_pieces
from tests.support.datasets import VOCAB_SIZE

KINDS = ("master", "exp_avg", "exp_avg_sq", "buffer")
MASK_ID = 4
SAVED_STEP = 3
MAX_RANKS = 4
PRECISIONS = [("fp32", "fp32")] * 3 + [("fp32", "bf16"), ("bf16", "fp32"), ("bf16", "bf16"), ("fp16", "fp32")]
"""What a pair is drawn from: most in fp32, where losses can be compared closely."""

Mutation = Callable[[], None]


@dataclass(frozen=True)
class Pair:
    """Save with `source`, continue with `target`: two configurations of the same model."""

    model: str
    source: RunConfig
    target: RunConfig

    @property
    def name(self) -> str:
        return f"{self.model}-{layout_name(self.source)}-to-{layout_name(self.target)}"


@dataclass(frozen=True)
class Outcome:
    """What one rank held at the checkpoint and did after it. `weights` are those that it computes with."""

    held: dict[str, Pieces]
    weights: Pieces
    engine_state: dict[str, Any]
    results: list[StepResult]
    samples: list[list[int | None]]


def layout_name(config: RunConfig) -> str:
    data = config.launch.num_workers // config.parallel.replica_size
    return f"{short_name(config.parallel, config.engine, data)}:{config.train.precision}"


def resharding_run(model: str, precision: str) -> RunConfig:
    name, _, method = model.partition("+")
    run = finetune_run(method, precision) if method else parity_run(name, precision)
    return run.with_keys({"train.steps": SAVED_STEP + GRID_STEPS})


@lru_cache
def legal_layouts(model: str, engine: str, precision: str) -> list[RunConfig]:
    """Every configuration that the rules allow, up to four ranks: offload to the CPU and uneven stages too."""
    run = resharding_run(model, precision)
    found = []
    for candidate in iter_candidates(run, MAX_RANKS):
        config = candidate.config
        if config.engine.name != engine:
            continue
        found.append(config)
        offloaded = config.with_keys({"engine.offload": "cpu"})
        stages = config.parallel.pipeline * config.parallel.virtual_pipeline
        layers = (1, config.model.num_layers - 1) if stages == 2 else None
        split = config.with_keys({"parallel.pipeline_split": layers})
        for other in (offloaded, *((split,) if layers else ())):
            if not arithmetic_problems(other, candidate.world_size):
                found.append(other)
    return found


def draw_layout(draw: random.Random, model: str, engine: str, precision: str) -> RunConfig:
    """A legal layout of up to four ranks, drawn again until it is legal: models with experts have too many to list."""
    run = resharding_run(model, precision)
    sizes = [sizes for sizes in product((1, 2, 4), repeat=4) if 1 < prod(sizes) <= MAX_RANKS]
    while True:
        tensor, context, pipeline, data = draw.choice(sizes)
        expert = draw.choice((1, 2, 4)) if run.model.moe else 1
        parallel = {
            "tensor": tensor, "context": context, "pipeline": pipeline, "expert": expert,
            "virtual_pipeline": draw.choice((1, 2)), "sequence": draw.random() < 0.5,
            "context_exchange": draw.choice((None, "ring")) if context > 1 else None,
        }  # fmt: skip
        settings = {"name": engine, "zero_stage": draw.randrange(4), "offload": draw.choice(("none", "none", "cpu"))}
        candidate = build_candidate(run, settings, parallel, data)
        if not arithmetic_problems(candidate.config, candidate.world_size):
            return candidate.config


def draw_family_pairs(count: int, seed: int, models: Sequence[str]) -> list[Pair]:
    """Pairs of the models in turn, from every engine to every engine in turn; layouts at random."""
    draw, pairs = random.Random(seed), []
    for number in range(count):
        engines = list(product(ENGINES, ENGINES))[number % len(ENGINES) ** 2]
        model = models[number % len(models)]
        precisions = draw.choice(PRECISIONS[:-1]) if number >= len(ENGINES) ** 2 else ("fp32", "fp32")
        layouts = [draw_layout(draw, model, *pair) for pair in zip(engines, precisions, strict=True)]
        pairs.append(Pair(model, *layouts))
    return pairs


def draw_pairs(count: int, seed: int) -> list[Pair]:
    """Pairs from every engine to every engine in turn, the rest at random; model and layouts at random."""
    draw = random.Random(seed)
    pairs = []
    for number in range(count):
        engines = list(product(ENGINES, ENGINES))[number % len(ENGINES) ** 2]
        model = draw.choice(("llama", "dropout", "gpt"))
        # The engines' first nine pairs are all in fp32, so that each is followed by losses.
        precisions = draw.choice(PRECISIONS) if number >= len(ENGINES) ** 2 else ("fp32", "fp32")
        source, target = (
            draw.choice(legal_layouts(model, engine, precision))
            for engine, precision in zip(engines, precisions, strict=True)
        )
        pairs.append(Pair(model, source, target))
    return pairs


def with_data(config: RunConfig, dataset: Path) -> RunConfig:
    special = SpecialTokensConfig(pad=0, mask=MASK_ID, sentinels=tuple(range(VOCAB_SIZE, config.model.vocabulary)))
    source = {"train": (SourceConfig(path=str(dataset)),), "verify": "off", "special_tokens": special}
    return config.with_keys({"data": config.data.with_keys(source)})


def save_and_continue(rank: int, world_size: int, config: RunConfig, folder: Path, more_steps: int) -> Outcome:
    """Train some steps, save a checkpoint as a run does, and train on."""
    engine = build_engine(config)
    state, _, _ = train(engine, config, TrainState(), SAVED_STEP, rank)
    store = dist.FileStore(str(folder / "said"), world_size)  # pyright: ignore[reportPrivateImportUsage]  # documented
    exchange = TorchRankStore(store, rank, world_size, timeout_seconds=60)
    manager = CheckpointManager(folder / "checkpoints", CheckpointConfig(), "name: x\n", {}, ranks=exchange)
    saving = Saving(manager, SAVED_STEP, lambda: None)
    saving.save(state, engine, None)
    outcome = held_by(engine, config), weights_of(engine), engine.state()
    _, results, samples = train(engine, config, state, more_steps, rank)
    saving.finish()
    return Outcome(*outcome, results, samples)


def load_and_continue(
    rank: int, world_size: int, config: RunConfig, checkpoint: Path, more_steps: int, mutation: Mutation | None = None
) -> Outcome:
    """Continue the checkpoint on one rank of another layout; `mutation` first breaks something in its process."""
    if mutation:
        mutation()
    engine = build_engine(config)
    state = restored(open_checkpoint(checkpoint, verify=rank == 0), engine, config)
    outcome = held_by(engine, config), weights_of(engine), engine.state()
    _, results, samples = train(engine, config, state, more_steps, rank)
    return Outcome(*outcome, results, samples)


def restored(saved: CheckpointReader, engine: Any, config: RunConfig) -> TrainState:
    """Continue a checkpoint; frozen weights, which it does not hold, are the initial ones here."""
    if not config.frozen:
        return restore(saved, engine)
    engine.load(BaseWeights(saved, config))
    engine.load_state(saved.state["engine"])
    return saved_state(saved)


def build_engine(config: RunConfig) -> Any:
    if config.engine.name == "deepspeed":
        small_pieces()
    return engine_class(config.engine.name)(config, torch.device("cpu"))


def train(
    engine: Any, config: RunConfig, state: TrainState, num_steps: int, rank: int
) -> tuple[TrainState, list[StepResult], list[list[int | None]]]:
    """Further steps as the loop does them: the state after them, their results, and the samples of this rank."""
    loader = build_loader(resolve(config), "train", rank)
    steps = loader.steps(first_sample=state.samples)
    results, samples = [], []
    for micro_batches in islice(steps, num_steps):
        step = state.step + 1
        lr = learning_rate(step, config.optim, config.total_steps)
        result = engine.train_step(step, micro_batches, lr)
        state = state.advanced(loader.global_batch_size, result.num_tokens, Budget.of(config).tokens_per_step)
        results.append(result)
        samples.append([batch.first_sample for batch in micro_batches])
    steps.close()
    return state, results, samples


def held_by(engine: Any, config: RunConfig) -> dict[str, Pieces]:
    fragments = list(engine.fragments())
    return {kind: pieces(f for f in fragments if f.kind == kind) for kind in KINDS}


def weights_of(engine: Any) -> Pieces:
    """The weights that this rank computes with, as boxes of the global tensors: copies on other ranks included."""
    if engine.config.engine.name == "torch":
        return pieces(Fragment.whole(name, "weight", parameter) for name, parameter in engine.model.named_parameters())
    return [piece for parameter, place in engine.placements.items() for piece in _weight(engine, parameter, place)]


def _weight(engine: Any, parameter: Any, place: Any) -> Pieces:
    whole: Any = nullcontext()
    if engine.config.engine.zero_stage == 3:
        import deepspeed

        whole = deepspeed.zero.GatheredParameters([parameter])
    with whole:
        return pieces([Fragment(place.name, "weight", place.global_shape, place.box, parameter.view(place.box.shape))])


def differences(saved: Sequence[Outcome], loaded: Sequence[Outcome], pair: Pair) -> list[str]:
    """What the target does not have as the source had it, in words; nothing where all is bit-identical."""
    problems: list[str] = []
    masters: Tensors = {}
    for kind in KINDS:
        before, after = (assemble([outcome.held[kind] for outcome in outcomes]) for outcomes in (saved, loaded))
        if before.keys() != after.keys():
            problems.append(f"{kind}: other tensors: {sorted(before.keys() ^ after.keys())}")
        problems += [
            f"{kind} of {name} differs in {_num_different(value, after[name])} of {value.size} elements"
            for name, value in before.items()
            if name in after and _num_different(value, after[name])
        ]
        masters = masters or before
    for config, outcomes in ((pair.source, saved), (pair.target, loaded)):
        problems += _weight_problems(masters, outcomes, config)
    before_state, after_state = saved[0].engine_state, [outcome.engine_state for outcome in loaded]
    for rank, state in enumerate(after_state):
        if state["updates"] != before_state["updates"]:
            problems.append(f"rank {rank}: updates = {state['updates']}, saved {before_state['updates']}")
        if "fp16" == pair.source.train.precision == pair.target.train.precision and state != before_state:
            problems.append(f"rank {rank}: loss scale {state['loss_scale']}, saved {before_state['loss_scale']}")
    return problems


def _num_different(a: np.ndarray, b: np.ndarray) -> int:
    """Elements whose bits differ: 0 and -0 count as different."""
    return int((a.view(np.uint32) != b.view(np.uint32)).sum()) if a.shape == b.shape else a.size


def _weight_problems(masters: Tensors, outcomes: Sequence[Outcome], config: RunConfig) -> Iterator[str]:
    """Weights on any rank that are not the masters, rounded; of what is frozen, the initial weights."""
    initial = InitialWeights(config.model, config.seed, config.finetune)
    frozen = {name: shape for name, shape in parameter_shapes(config.model).items() if name in config.frozen}
    masters = masters | {name: initial.read(name, "master", Box.whole(shape)).numpy() for name, shape in frozen.items()}
    dtype, seen = DTYPES[config.train.precision], set()
    for rank, outcome in enumerate(outcomes):
        for name, shape, box, data in outcome.weights:
            seen.add(name)
            expected = torch.from_numpy(masters[name][box.slices_in(Box.whole(shape))]).to(dtype).float().numpy()
            if _num_different(np.ascontiguousarray(expected), data):
                yield f"weights of {name} on rank {rank} of {layout_name(config)} are not the masters, rounded"
    if seen != masters.keys():
        yield f"{layout_name(config)} computes without {sorted(masters.keys() - seen)}"


def samples_by_step(outcomes: Sequence[Outcome], config: RunConfig) -> list[list[int | None]]:
    """The first samples of each step's micro-batches in their order, from the ranks of all places on the data axis."""
    layout = plan_layout(config.parallel, config.launch.num_workers)
    of_place: dict[int, list[list[int | None]]] = {}
    for rank, outcome in enumerate(outcomes):
        known = of_place.setdefault(layout.coordinates(rank).data, outcome.samples)
        assert known == outcome.samples, "ranks of one place on the data axis were given other samples"
    steps = zip(*(of_place[place] for place in range(layout.data)), strict=True)
    return [[sample for micro in zip(*ranks, strict=True) for sample in micro] for ranks in steps]
