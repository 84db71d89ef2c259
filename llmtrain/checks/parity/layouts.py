"""The layouts to compare, and the user's model, shrunk until a layout takes seconds."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from llmtrain.config.attention import kind_of
from llmtrain.config.engines import ENGINES
from llmtrain.config.finetune import FinetuneConfig, LoraConfig, PruneConfig, QuantizeConfig
from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import (
    FrozenNames,
    declare_parameters,
    is_kept,
    is_target,
    iter_linears,
    quantized_linears,
)
from llmtrain.config.rules.arithmetic import arithmetic_problems
from llmtrain.config.schema import EngineConfig, ParallelConfig, RunConfig
from llmtrain.errors import ConfigError

SHRUNK_SEQ_LEN = 32
SHRUNK_GROUP = 8
"""Of quantize: as many inputs as each of four tensor ranks has."""
UNKNOWN_LABELS = 5
"""Labels of a model whose number of them only its data tells."""
SMOOTH = {"relu": "gelu", "reglu": "geglu"}
"""Smooth stand-ins for activations whose slope jumps: where rounding puts a value on the other side of 0, gradients
differ for good, though every layout is right."""
STEADY_EPS = 1e-6
"""The least of `optim.eps`. AdamW's first step is g / (|g| + eps): of a gradient of 1e-8, a millionth of its tensor's,
the usual 1e-8 makes a step of visible size that follows the last bits of every sum, whose order is the layout's."""
STEADY_LR = {"adamw": 1e-3, "lion": 1e-5}
"""The most of `optim.lr` by optimizer. Each of lion's steps is a sign: where rounding turns one, a weight is two steps
off for good, which has to stay below what is allowed."""
AXES = {"tp": "tensor", "pp": "pipeline", "vp": "virtual_pipeline", "cp": "context", "ep": "expert"}
PART = re.compile(
    r"(tp|pp|vp|cp|ep|dp|zero)([0-9]{1,3})|split([0-9]{1,3}(?:\.[0-9]{1,3}){0,63})|sp|zb|heads|ring|overlap|offload"
)
ORDERS = ((1, None), (2, None), (1, "zero_bubble"))
"""Chunks per stage with the schedule."""
MOST_RANKS = 64
FORM = (
    "write [ENGINE:]PART+PART..., parts tp2 pp2 vp2 zb cp2 ep2 dp2 sp heads ring zero1 split3.1 overlap offload, as in "
    "megatron:tp2+sp+zero1."
)


@dataclass(frozen=True)
class Candidate:
    """A layout under its short name, with the ranks that it takes."""

    name: str
    world_size: int
    config: RunConfig


def shrink(config: RunConfig, precision: str, own_ranks: int = 0) -> RunConfig:
    """The same architecture with few and small layers, 8 micro-batches of 2 short samples per step, and no compiling.

    There are as many layers as the run's own pipeline needs, if it fits on `own_ranks`. Kept are the kinds of
    everything (but for activations, see SMOOTH), the ratio of query to key heads, dropout, recompute and the optimizer
    (but for its eps and lr, see STEADY_EPS and STEADY_LR).
    """
    own = config.parallel
    layers = max(4, own.pipeline * own.virtual_pipeline if own.pipeline <= own_ranks else 0)
    train = {
        "global_batch_size": 16, "micro_batch_size": 2, "precision": precision, "compile": False,
        "steps": 100, "tokens": None, "epochs": None,
    }  # fmt: skip
    shrunk = shrunk_model(config.model, layers)
    freeze = shrunk_freeze(shrunk, config.optim.freeze)
    steady_lr = min(config.optim.lr, STEADY_LR[config.optim.name])
    optim = {"lr": steady_lr, "warmup_steps": 0, "min_lr": 0.0, "freeze": freeze}
    if config.optim.name != "lion":  # it divides by nothing
        optim["eps"] = max(config.optim.eps, STEADY_EPS)
    distill = config.distill and config.distill.with_keys(
        {"model": shrunk_model(config.distill.model or config.model, layers), "top_k": min(config.distill.top_k, 32)}
    )
    return config.with_keys(
        {
            "model": shrunk,
            "distill": distill,
            "quantize": config.quantize and shrunk_quantize(config.quantize, shrunk),
            "prune": config.prune and shrunk_prune(config.prune, shrunk),
            "finetune": config.finetune and shrunk_finetune(config.finetune, shrunk),
            "data.seq_len": SHRUNK_SEQ_LEN,
            "train": config.train.with_keys(train),
            "optim": config.optim.with_keys(optim),
            "parallel": ParallelConfig(),
            "engine": EngineConfig(),
        }
    )


def shrunk_model(model: ModelConfig, layers: int) -> ModelConfig:
    """The same kinds of everything in small, with so many layers; of two stacks each has half of them."""
    group = model.num_heads // model.kv_heads
    attention = model.attention
    moe = model.moe and model.moe.with_keys({"num_experts": 4, "ffn_hidden_size": 48})
    both = model.family == "encoder_decoder"
    half = -(-layers // 2)
    sizes: dict[str, Any] = {
        "num_layers": half if both else layers, "num_encoder_layers": half if both else None,
        "hidden_size": 32, "num_heads": 4,
        "num_kv_heads": max(1, 4 // group), "head_dim": 8,
        "ffn_hidden_size": 96 if model.gated else 128, "vocab_size": 307, "max_seq_len": 64, "moe": moe,
        "activation": SMOOTH.get(model.activation, model.activation),
        "attention": attention.with_keys(kind_of(attention).small),
    }  # fmt: skip
    if model.head in ("classifier", "token_classifier") and not (model.num_labels or model.labels):
        sizes["num_labels"] = UNKNOWN_LABELS
    return model.with_keys(sizes)


def shrunk_quantize(quantize: QuantizeConfig, model: ModelConfig) -> QuantizeConfig:
    """The same rounding in small groups, with what of `keep` fits a shrunk model; none where it would leave nothing."""
    keep = fitting_linears(model, quantize.keep, is_kept)
    keys = {"keep": keep if any(quantized_linears(model, keep)) else ()}
    return quantize.with_keys({**keys, "group": SHRUNK_GROUP} if quantize.numbers.group else keys)


def shrunk_prune(prune: PruneConfig, model: ModelConfig) -> PruneConfig:
    """The same kind within the first steps, of what of the targets fits a shrunk model."""
    targets = fitting_linears(model, prune.targets, is_target) or PruneConfig().targets
    rising = {"until_step": 2, "every_steps": 1} if prune.until_step else {}
    return prune.with_keys({"targets": targets, "from_step": 1, **rising})


def shrunk_finetune(finetune: FinetuneConfig, model: ModelConfig) -> FinetuneConfig:
    """The same method, on what of the targets fits a shrunk model, with a prompt that fits its short samples."""
    targets = fitting_linears(model, finetune.lora.targets, is_target) or LoraConfig().targets
    also = fitting_parameters(model, finetune.lora.train_also)
    lora = finetune.lora.with_keys({"targets": targets, "train_also": also})
    prompt = finetune.prompt.with_keys({"tokens": min(finetune.prompt.tokens, SHRUNK_SEQ_LEN)})
    return finetune.with_keys({"lora": lora, "prompt": prompt})


def fitting_linears(model: ModelConfig, patterns: Sequence[str], fits: Callable[[str, str], bool]) -> tuple[str, ...]:
    """The patterns that fit a linear of a model."""
    linears = [linear for linear, _ in iter_linears(model)]
    return tuple(pattern for pattern in patterns if any(fits(linear, pattern) for linear in linears))


def fitting_parameters(model: ModelConfig, patterns: Sequence[str]) -> tuple[str, ...]:
    """The patterns that fit a parameter of a model."""
    names = list(declare_parameters(model))
    return tuple(pattern for pattern in patterns if any(name in FrozenNames((pattern,)) for name in names))


def shrunk_freeze(model: ModelConfig, patterns: Sequence[str]) -> tuple[str, ...]:
    """The patterns of `optim.freeze` that fit a shrunk model; none where they would leave nothing to train."""
    fitting = fitting_parameters(model, patterns)
    return () if all(name in FrozenNames(fitting) for name in declare_parameters(model)) else fitting


def parse_candidate(text: str, config: RunConfig) -> Candidate:
    """The candidate that a text such as `megatron:tp2+sp+zero1` names. Raises ConfigError where it is illegal."""
    engine, _, layout = text.rpartition(":")
    engine = engine or "megatron"
    parallel: dict[str, Any] = {}
    settings: dict[str, Any] = {"name": engine}
    data = 1
    for part in layout.split("+"):
        match = PART.fullmatch(part)
        size = int(match[2] or 1) if match and match[1] != "zero" else 1
        if match is None or not 1 <= size <= MOST_RANKS or engine not in ENGINES:
            raise ConfigError(f"--layouts {text}: {FORM}")
        if part == "sp":
            parallel["sequence"] = True
        elif part in ("heads", "ring"):
            parallel["context_exchange"] = part
        elif part == "zb":
            parallel["pipeline_schedule"] = "zero_bubble"
        elif part == "overlap":
            parallel["overlap_grad_reduce"] = True
        elif part.startswith("split"):
            parallel["pipeline_split"] = tuple(map(int, match[3].split(".")))
        elif part == "offload":
            settings["offload"] = "cpu"
        elif match[1] == "zero":
            settings["zero_stage"] = int(match[2])
        elif match[1] == "dp":
            data = int(match[2])
        else:
            parallel[AXES[match[1]]] = int(match[2])
    candidate = build_candidate(config, settings, parallel, data)
    problems = arithmetic_problems(candidate.config, candidate.world_size)
    if problems:
        raise ConfigError(problems)
    return candidate


def own_candidate(whole: RunConfig, small: RunConfig, max_ranks: int) -> Candidate | None:
    """The run's own layout on the shrunk model, with every key of it but fewer data ranks where that must be.

    None where it takes more ranks, or where it is one process.
    """
    replicas = max(1, whole.launch.num_workers // whole.parallel.replica_size)
    split = shrunk_split(whole.parallel.pipeline_split, small.model.total_layers)
    parallel = {**whole.parallel.model_dump(), "pipeline_split": split}
    if whole.parallel.context > 1 and whole.context_exchange == "ring":
        parallel["context_exchange"] = "ring"  # a shrunk model has other heads, which might be dealt out
    engine = {**whole.engine.model_dump(), "offload": "none" if whole.engine.offload == "none" else "cpu"}
    for data in range(min(replicas, max_ranks), 0, -1):
        candidate = build_candidate(small, engine, parallel, data)
        fits = candidate.world_size <= max_ranks
        if fits and not arithmetic_problems(candidate.config, candidate.world_size):
            return candidate if candidate.world_size > 1 else None
    return None


def shrunk_split(split: tuple[int, ...] | None, num_layers: int) -> tuple[int, ...] | None:
    """So many layers over the same chunks: those without layers have none, the others shares as alike as can be."""
    if split is None:
        return None
    shares = [min(1, layers) for layers in split]
    while sum(shares) < num_layers:
        # The next layer is that of the chunk which is furthest behind.
        behind = [layers / (share + 1) for layers, share in zip(split, shares, strict=True)]
        shares[behind.index(max(behind))] += 1
    return tuple(shares)


def iter_candidates(config: RunConfig, max_ranks: int) -> Iterator[Candidate]:
    """Every legal layout on every engine with up to so many ranks, the smallest first."""
    sizes = range(1, max_ranks + 1)
    found = []
    for engine, tensor, context, pipeline, data in product(ENGINES, sizes, sizes, sizes, sizes):
        if tensor * context * pipeline * data > max_ranks:
            continue
        expert_sizes = sizes if config.model.moe else (1,)
        exchanges = (None, "ring") if context > 1 else (None,)
        axes = {"tensor": tensor, "context": context, "pipeline": pipeline}
        stages = ENGINES[engine].zero_stages
        further = product(ORDERS, expert_sizes, (False, True), exchanges, stages)
        for (virtual, schedule), expert, sequence, exchange, zero_stage in further:
            parallel = {
                **axes, "virtual_pipeline": virtual, "pipeline_schedule": schedule, "expert": expert,
                "sequence": sequence, "context_exchange": exchange,
            }  # fmt: skip
            candidate = build_candidate(config, {"name": engine, "zero_stage": zero_stage}, parallel, data)
            unsaid = candidate.config.with_keys({"parallel.context_exchange": None})
            if exchange and unsaid.context_exchange == exchange:
                continue  # the same as without saying so
            if not arithmetic_problems(candidate.config, candidate.world_size):
                found.append(candidate)
    yield from sorted(found, key=lambda candidate: candidate.world_size)


def build_candidate(config: RunConfig, engine: dict[str, Any], parallel: dict[str, Any], data: int) -> Candidate:
    """The candidate with these sections and that data parallel size; it may break rules."""
    section = ParallelConfig(**parallel)
    world_size = section.tensor * section.pipeline * section.context * data
    keys = {"parallel": section, "engine": engine, "launch.num_workers": world_size, "launch.device": "cpu"}
    changed = config.with_keys(keys)
    return Candidate(short_name(section, changed.engine, data), world_size, changed)


def short_name(parallel: ParallelConfig, engine: EngineConfig, data: int) -> str:
    """The text that `parse_candidate` reads."""
    sizes = {"dp": data, **{short: getattr(parallel, axis) for short, axis in AXES.items()}}
    parts = [f"{short}{size}" for short, size in sizes.items() if size > 1]
    parts += ["zb"] if parallel.pipeline_schedule == "zero_bubble" else []
    parts += ["sp"] if parallel.sequence else []
    parts += [parallel.context_exchange] if parallel.context_exchange else []
    parts += [f"split{'.'.join(map(str, parallel.pipeline_split))}"] if parallel.pipeline_split else []
    parts += ["overlap"] if parallel.overlap_grad_reduce else []
    parts += [f"zero{engine.zero_stage}"] if engine.zero_stage else []
    parts += ["offload"] if engine.offload == "cpu" else []
    return f"{engine.name}:{'+'.join(parts) or 'dp1'}"
