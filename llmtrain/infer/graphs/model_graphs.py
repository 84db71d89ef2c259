"""The graphs of a model: which there are, what goes into them and what comes out."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from llmtrain.config.model import ModelConfig
from llmtrain.infer.graphs.modules import MaskedModel, MemoryMaker, TextClassifier, TextDecoder
from llmtrain.interop.graphs.ports import PAST, PRESENT, Graph, Port
from llmtrain.models.experts.dense import DenseMoE, RouterWeights
from llmtrain.models.experts.mixture import MoE
from llmtrain.models.transformer import Transformer

MODEL, ENCODER, DECODER = "model", "encoder_model", "decoder_model"
"""Names of graphs: of a model that has one, and of an encoder-decoder."""


def model_graphs(model: Transformer) -> list[Graph]:
    """The graphs of a model in evaluation mode, whose experts are taken apart for it."""
    for stack in model.stacks:
        for layer in stack.layers.values():
            if isinstance(layer.moe, MoE):
                layer.moe = DenseMoE(layer.moe)
    return [replace(graph, exact=(RouterWeights,)) for graph in _graphs(model)]


def _graphs(model: Transformer) -> list[Graph]:
    config, dtype = model.config, next(model.parameters()).dtype
    vector = Port("text_embedding", ("batch", config.hidden_size))
    if config.family == "encoder":
        return [Graph(MODEL, MaskedModel(model), _text("length", config.token_types), (*_logits(config), vector))]
    if config.predicts_labels:
        return [Graph(MODEL, TextClassifier(model), _text("length"), _logits(config))]
    memory = tuple(_pairs(config, "memory", "source", dtype)) if model.has_memory else ()
    mask = (Port("encoder_attention_mask", ("batch", "source"), "mask", torch.int64),) if memory else ()
    past, present = (tuple(_past(config, *names, dtype)) for names in ((PAST, "past"), (PRESENT, "total")))
    inputs = (*_text("length", 0, "total"), *mask, *memory, *past)
    decoder = Graph(DECODER if memory else MODEL, TextDecoder(model), inputs, (*_logits(config), *present))
    if not memory:
        return [decoder]
    return [Graph(ENCODER, MemoryMaker(model), _text("source"), (*memory, vector)), decoder]


def _text(length: str, token_types: int = 0, total: str | None = None) -> tuple[Port, ...]:
    ids = Port("input_ids", ("batch", length), "ids", torch.int64)
    mask = Port("attention_mask", ("batch", total or length), "mask", torch.int64)
    types = Port("token_type_ids", ("batch", length), "types", torch.int64)
    return (ids, mask, types) if token_types > 1 else (ids, mask)


def _logits(config: ModelConfig) -> tuple[Port, ...]:
    if config.head == "span":
        return Port("start_logits", ("batch", "length")), Port("end_logits", ("batch", "length"))
    if config.head == "classifier":
        return (Port("logits", ("batch", config.num_classes)),)
    return (Port("logits", ("batch", "length", config.num_classes if config.predicts_labels else config.vocabulary)),)


def _past(config: ModelConfig, prefix: str, length: str, dtype: torch.dtype) -> Iterator[Port]:
    if config.attention.kind == "linear":
        shape = ("batch", config.num_heads, config.head_size, config.head_size + 1)
        yield from (Port(f"{prefix}.{layer}.sums", shape) for layer in range(config.decoder_layers))
    else:
        yield from _pairs(config, prefix, length, dtype)


def _pairs(config: ModelConfig, prefix: str, length: str, dtype: torch.dtype) -> Iterator[Port]:
    for layer in range(config.decoder_layers):
        for part in ("key", "value"):
            shape = ("batch", config.kv_heads, length, config.head_size)
            yield Port(f"{prefix}.{layer}.{part}", shape, dtype=dtype)
