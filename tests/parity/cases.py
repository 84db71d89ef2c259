"""Running one layout of a tiny model and comparing it with one process."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from launch.parity import FP32, Levels, RankTrace, Trace, Verdict, assemble_trace, compare, trace_layout, trace_rank
from llmtrain.config.schema import EngineConfig, ParallelConfig, RunConfig
from llmtrain.engines.torch_engine import TorchEngine
from tests.support.ranks import run_ranks
from tests.support.samples import tiny_model, tiny_run

GQA_TIED: dict[str, Any] = {"num_layers": 4}
DROPOUT: dict[str, Any] = {**GQA_TIED, "dropout": 0.1, "attention_dropout": 0.1}
GPT_UNTIED: dict[str, Any] = {
    "num_layers": 4, "num_kv_heads": 4, "tie_embeddings": False, "position": "learned", "norm": "layernorm",
    "activation": "gelu", "bias": True,
}  # fmt: skip
MODELS = {"llama": GQA_TIED, "dropout": DROPOUT, "gpt": GPT_UNTIED}


def parity_run(model: str, precision: str = "fp32", recompute: str = "none") -> RunConfig:
    """The run that the reference does: 8 micro-batches of 2 samples."""
    train = {"global_batch_size": 16, "micro_batch_size": 2, "precision": precision, "recompute": recompute}
    return tiny_run(tiny_model(**MODELS[model]), train, {"lr": 1e-3})


def with_layout(config: RunConfig, engine: dict[str, Any], parallel: dict[str, Any]) -> RunConfig:
    return config.model_copy(update={"engine": EngineConfig(**engine), "parallel": ParallelConfig(**parallel)})


@lru_cache
def reference(config: RunConfig, num_steps: int) -> Trace:
    """The trace of the torch engine in this process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return assemble_trace([trace_rank(TorchEngine, config, num_steps, (0, 1))])
    finally:
        torch.set_num_threads(threads)


def traced_rank(
    rank: int, world_size: int, config: RunConfig, num_steps: int, mutation: Callable[[], None] | None
) -> RankTrace:
    """One rank of a layout; `mutation` first breaks something in its process."""
    if mutation:
        mutation()
    return trace_layout(rank, world_size, config, num_steps)


def verdict(
    config: RunConfig,
    layout: RunConfig,
    world_size: int,
    num_steps: int = 20,
    levels: Levels = FP32,
    mutation: Callable[[], None] | None = None,
) -> Verdict:
    """Compare a layout with the reference."""
    ranks = run_ranks(traced_rank, world_size, layout, num_steps, mutation, timeout_seconds=120)
    return compare(reference(config, num_steps), assemble_trace(ranks), levels)
