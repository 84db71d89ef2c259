"""A tiny model of every kind that has graphs, and graphs that PyTorch runs as they are."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from llmtrain.config.attention import SCALING_KINDS, AttentionConfig
from llmtrain.config.model import ModelConfig, MoeConfig
from llmtrain.infer.batching.request import Request
from llmtrain.infer.batching.sampling import Sampling
from llmtrain.infer.embedding import embedding
from llmtrain.infer.generate import iter_tokens
from llmtrain.infer.model import logits_of
from llmtrain.interop.graphs.ports import Graph
from llmtrain.interop.graphs.proof import OriginalModel
from tests.unit.interop.models import (
    BERT,
    GPT2,
    LLAMA,
    MIXTRAL,
    QWEN3,
    SWITCH,
    T5,
    T5_V11,
    WINDOW,
    random_model,
    scaled,
)


def with_attention(**keys: object) -> ModelConfig:
    return LLAMA.with_keys({"attention": AttentionConfig(**keys)})  # type: ignore[arg-type]


STRIDED = AttentionConfig(kind="strided", stride=4)
LABELS = {"labels": ("B-X", "I-X", "O")}
ALIBI = LLAMA.with_keys({"position": "alibi"})


def calm(config: ModelConfig) -> ModelConfig:
    """T5 v1.1 with scaled scores. Unscaled, as in `T5` they are, its random weights make them so large that in fp32 the
    model itself is 1e-4 to 2e-4 from fp64, and its graphs are: nothing finer can be asked of either."""
    return config.with_keys({"attention": config.attention.with_keys({"scale": 0.25})})


KINDS = {
    "llama": LLAMA,
    "gpt2": GPT2,
    "qwen3": QWEN3,
    **{f"llama {kind}": scaled(kind) for kind in SCALING_KINDS},
    "sinusoidal": LLAMA.with_keys({"position": "sinusoidal"}),
    "no positions": LLAMA.with_keys({"position": "none"}),
    "alibi": ALIBI,
    "t5 positions": LLAMA.with_keys({"position": "t5_relative", "relative_max_distance": 20}),
    "window": LLAMA.with_keys({"attention": WINDOW}),
    "strided": LLAMA.with_keys({"attention": STRIDED}),
    "bigbird": with_attention(kind="bigbird", block_size=4, num_global=1, num_random=1),
    "longformer": with_attention(kind="longformer", window=5, num_global=2),
    "linear": with_attention(kind="linear"),
    "sinks and cap": with_attention(sinks=True, softcap=5.0),
    "alibi strided": ALIBI.with_keys({"attention": STRIDED}),
    "mixtral": MIXTRAL,
    "shared experts": MIXTRAL.with_keys({"moe": MoeConfig(num_experts=4, num_shared_experts=1, every_n_layers=2)}),
    "decoder tagger": LLAMA.with_keys({"head": "token_classifier", "num_labels": 4}),
    "decoder classifier": LLAMA.with_keys({"head": "classifier", **LABELS}),
    "bert": BERT,
    "bert linear": BERT.with_keys({"attention": AttentionConfig(kind="linear"), "attention_dropout": 0.0}),
    "bert alibi": BERT.with_keys({"position": "alibi", "head": "linear"}),
    "bert window": BERT.with_keys({"attention": WINDOW}),
    "bert classifier": BERT.with_keys({"head": "classifier", **LABELS}),
    "bert tagger": BERT.with_keys({"head": "token_classifier", **LABELS}),
    "bert answers": BERT.with_keys({"head": "span"}),
    "t5": T5,
    "t5 reglu": T5.with_keys({"activation": "reglu"}),
    "t5 v1.1": calm(T5_V11),
    "t5 linear": T5.with_keys({"position": "sinusoidal", "attention": AttentionConfig(kind="linear")}),
    "switch": SWITCH,
}

REFUSED = {
    "expert choice": MIXTRAL.with_keys({"moe": MoeConfig(router="expert_choice", num_experts=4)}),
}
"""Kinds that have none."""

START_ID = 3


@torch.no_grad()
def eager(graph: Graph, inputs: Sequence[Tensor]) -> list[Tensor]:
    """A graph without a trace of it; sizes are those that its ports say."""
    found = list(graph.module(*inputs))
    sizes = dict[str, int]()
    for port, x in (*zip(graph.inputs, inputs, strict=True), *zip(graph.outputs, found, strict=True)):
        for dim, size in zip(port.dims, x.shape, strict=True):
            assert sizes.setdefault(dim, size) == size if isinstance(dim, str) else dim == size, (port, x.shape)
        assert x.dtype == port.dtype, port
    return found


def original(config: ModelConfig) -> OriginalModel:
    model = random_model(config)

    def continued(ids: Sequence[int], count: int) -> list[int]:
        encodes = config.family == "encoder_decoder"
        prompt, source = ((START_ID,), tuple(ids)) if encodes else (tuple(ids), ())
        return list(iter_tokens(model, Request(prompt, count, Sampling(0.0), source=source)))

    return OriginalModel(config, partial(logits_of, model), continued, partial(embedding, model), START_ID)
