"""Running one layout of a tiny model and comparing it with one process."""

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import pytest
import torch

from llmtrain.checks.parity.compare import (
    FP32,
    Levels,
    RankTrace,
    Trace,
    Verdict,
    assemble_trace,
    compare,
    trace_layout,
    trace_rank,
)
from llmtrain.checks.parity.layouts import STEADY_EPS
from llmtrain.config.schema import RunConfig
from llmtrain.engines.torch_engine import TorchEngine
from tests.support.ranks import run_ranks
from tests.support.samples import tiny_model, tiny_run

SHORT_STEPS, GRID_STEPS = 3, 20
"""Steps that are compared in `make test`, and in the whole grids of `make test-all`."""

GQA_TIED: dict[str, Any] = {"num_layers": 4}
DROPOUT: dict[str, Any] = {**GQA_TIED, "dropout": 0.1, "attention_dropout": 0.1}
GPT_UNTIED: dict[str, Any] = {
    "num_layers": 4, "num_kv_heads": 4, "tie_embeddings": False, "position": "learned", "norm": "layernorm",
    "activation": "gelu", "bias": True,
}  # fmt: skip
BERT: dict[str, Any] = {
    "family": "encoder", "num_layers": 4, "num_kv_heads": 4, "position": "learned", "norm": "layernorm",
    "norm_position": "post", "activation": "gelu", "bias": True, "token_types": 2, "embedding_norm": True,
    "head": "mlm", "dropout": 0.1,
}  # fmt: skip
T5: dict[str, Any] = {
    "family": "encoder_decoder", "num_layers": 2, "num_encoder_layers": 2, "num_kv_heads": 4, "position": "t5_relative",
    "relative_buckets": 8, "relative_max_distance": 20, "activation": "gelu", "scaled_head": True, "dropout": 0.1,
    "attention": {"scale": 1.0}, "init": {"scheme": "t5", "depth_scaled": False},
}  # fmt: skip
"""Not relu, of which rounding at its kink makes another gradient sooner or later; see test_families.py."""
SWITCH = {"num_experts": 4, "router": "switch", "capacity_factor": 1.0, "every_n_layers": 2, "jitter": 0.01}
SWITCH_T5: dict[str, Any] = {**T5, "num_layers": 2, "moe": {**SWITCH, "z_loss_coeff": 1e-3}}
TOP_1: dict[str, Any] = {**GQA_TIED, "moe": {**SWITCH, "every_n_layers": 1}}
TOP_2: dict[str, Any] = {**GQA_TIED, "qk_norm": True, "moe": {"num_experts": 4, "ffn_hidden_size": 48}}
SHARED: dict[str, Any] = {
    **GQA_TIED, "num_heads": 4, "attention": {"sinks": True, "softcap": 30.0},
    "moe": {"num_experts": 4, "num_shared_experts": 1, "ffn_hidden_size": 32, "bias_update_rate": 1e-3,
            "aux_loss_coeff": 0.0, "every_n_layers": 2},
}  # fmt: skip
RELU: dict[str, Any] = {**SWITCH_T5, "activation": "relu"}
MODELS = {
    "llama": GQA_TIED, "dropout": DROPOUT, "gpt": GPT_UNTIED, "bert": BERT, "t5": T5, "switch_t5": SWITCH_T5,
    "top_1": TOP_1, "top_2": TOP_2, "shared": SHARED, "relu": RELU,
}  # fmt: skip
DATA: dict[str, dict[str, Any]] = {
    "bert": {"objective": "masked"}, "t5": {"objective": "span_corruption"},
    "switch_t5": {"objective": "span_corruption"}, "relu": {"objective": "span_corruption"},
}  # fmt: skip


LORA: dict[str, Any] = {"method": "lora", "lora": {"rank": 4, "alpha": 8.0, "dropout": 0.1}}
SOME: dict[str, Any] = {
    "method": "lora",
    "lora": {"rank": 3, "targets": ["attention.q", "mlp.down", "decoder.layers.1.*"], "train_also": ["*norm*"]},
}
EXPERTS: dict[str, Any] = {"method": "lora", "lora": {"rank": 8, "rslora": True}}
OUTPUT: dict[str, Any] = {"method": "adapter", "adapter": {"size": 8}}
BOTH: dict[str, Any] = {"method": "adapter", "adapter": {"size": 8, "placement": "both", "activation": "silu"}}
PROMPT: dict[str, Any] = {"method": "prompt", "prompt": {"tokens": 8}}
FINETUNED: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("dropout", LORA), "some": ("gpt", SOME), "output": ("llama", OUTPUT), "both": ("gpt", BOTH),
    "prompt": ("llama", PROMPT), "experts": ("top_2", EXPERTS), "shared": ("shared", EXPERTS), "bert": ("bert", LORA),
    "bert_both": ("bert", BOTH), "t5": ("t5", LORA), "t5_prompt": ("t5", PROMPT), "switch": ("switch_t5", EXPERTS),
}  # fmt: skip
"""A model and a section `finetune` by name."""


def finetune_run(name: str, precision: str = "fp32") -> RunConfig:
    model, section = FINETUNED[name]
    return parity_run(model, precision).with_keys({"finetune": section})


def parity_run(model: str, precision: str = "fp32", recompute: str = "none") -> RunConfig:
    """The run that the reference does: 4 micro-batches of 2 samples, so that 4 replicas have one each."""
    train = {"global_batch_size": 8, "micro_batch_size": 2, "precision": precision, "recompute": recompute}
    run = tiny_run(tiny_model(**MODELS[model]), train, {"lr": 1e-3, "eps": STEADY_EPS})
    return run.with_keys({"data": run.data.with_keys(DATA.get(model, {}))})


def short_and_whole(short: Iterable[tuple[Any, ...]], grid: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Parameters of a test that compares: a selection for some steps, and the whole grid, marked, for more."""
    few = [pytest.param(*case, SHORT_STEPS, id=case_name(case)) for case in sorted(short)]
    return few + [
        pytest.param(*case, GRID_STEPS, id=f"{case_name(case)}-{GRID_STEPS}", marks=pytest.mark.whole_grid)
        for case in grid
    ]


def case_name(case: tuple[Any, ...]) -> str:
    return "-".join(map(str, case))


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


HANGS_AFTER = 400.0
"""Seconds. A rank that dies is heard at once, and layers that are compiled take minutes on a busy machine."""


def verdict(
    config: RunConfig,
    layout: RunConfig,
    world_size: int,
    num_steps: int = SHORT_STEPS,
    levels: Levels = FP32,
    mutation: Callable[[], None] | None = None,
) -> Verdict:
    """Compare a layout with the reference."""
    ranks = run_ranks(traced_rank, world_size, layout, num_steps, mutation, timeout_seconds=HANGS_AFTER)
    return compare(reference(config, num_steps), assemble_trace(ranks), levels)
