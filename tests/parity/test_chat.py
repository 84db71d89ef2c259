"""Packed conversations are single ones: loss and every gradient of a packed batch are those of its conversations, each
alone in plain PyTorch, summed and divided by the number of all trained tokens; in every layout. And transformers, fed
with single conversations, trains as a run does with packed ones."""

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from llmtrain.checks.parity.compare import Pieces, Tensors, assemble, pieces, worst_tensor
from llmtrain.config.rules.arithmetic import arithmetic_problems
from llmtrain.config.schema import RunConfig
from llmtrain.data.loader import BatchLoader
from llmtrain.interop.hf import FAMILIES
from llmtrain.interop.name_table import iter_theirs
from llmtrain.models.transformer import build_model, counted_positions
from llmtrain.preflight.resolve import resolve
from llmtrain.train.setup import build_loader
from llmtrain.values.batch import IGNORED_LABEL, ModelInputs
from tests.parity.resharding import build_engine
from tests.support.datasets import chat_record, random_conversations, write_target_dataset
from tests.support.ranks import run_ranks
from tests.support.samples import tiny_model, tiny_run

SEQ_LEN, STEPS = 48, 20
CHATS = [random_conversations(60, seed, longest=44) for seed in range(2)]
BY_IDS = {ids.tobytes(): (ids, spans) for shard in CHATS for ids, spans in shard}

LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "tp2": (2, {"name": "megatron", "zero_stage": 0}, {"tensor": 2}),
    "tp2+sp": (2, {"name": "megatron", "zero_stage": 0}, {"tensor": 2, "sequence": True}),
    "pp2": (2, {"name": "megatron", "zero_stage": 0}, {"pipeline": 2}),
    "cp2": (2, {"name": "megatron", "zero_stage": 0}, {"context": 2}),
    "dp2": (2, {"name": "torch"}, {}),
    "zero1": (2, {"name": "megatron", "zero_stage": 1}, {}),
    "deepspeed zero1": (2, {"name": "deepspeed", "zero_stage": 1}, {}),
    "zero2": (2, {"name": "deepspeed", "zero_stage": 2}, {}),
    "zero3": (2, {"name": "deepspeed", "zero_stage": 3}, {}),
}
CHOSEN = {
    "tp2+sp": {"train_on": "last"}, "pp2": {}, "cp2": {"train_on_end": False}, "dp2": {},
    "zero1": {"train_on": "all"}, "zero3": {},
}  # fmt: skip
"""What `make test` tries."""


class Step(NamedTuple):
    """What a step reports, its gradients, and the weights before it."""

    loss: float
    num_tokens: int
    gradients: Pieces
    initial: Pieces


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    write_target_dataset(folder / "data", CHATS, chat_record())
    return folder


def config_of(folder: Path, layout: str | None = None, chat: dict[str, Any] | None = None, **keys: Any) -> RunConfig:
    model = tiny_model(num_layers=2, num_kv_heads=2, max_seq_len=SEQ_LEN)
    run = tiny_run(model, {"steps": STEPS, "global_batch_size": 8, "micro_batch_size": 2}, {"weight_decay": 0.0})
    data = {"train": [{"path": str(folder / "data")}], "objective": "chat", "seq_len": SEQ_LEN, "chat": chat or {}}
    data |= {"cache_dir": str(folder / "cache"), **keys}
    ranks, engine, parallel = LAYOUTS[layout] if layout else (1, {"name": "torch"}, {})
    config = run.with_keys(
        {"data": data, "engine": engine, "parallel": parallel, "launch.num_workers": ranks, "output_dir": str(folder)}
    )
    assert arithmetic_problems(config, ranks) == []
    return config


def first_step(rank: int, world_size: int, config: RunConfig, mutation: Callable[[], None] | None) -> Step:
    if mutation:
        mutation()
    engine = build_engine(config)
    gradients: list[Pieces] = []
    engine.inspect_gradients = lambda fragments: gradients.append(pieces(fragments))
    initial = pieces(fragment for fragment in engine.fragments() if fragment.kind == "master")
    steps = build_loader(resolve(config), "train", rank).steps(0)
    result = engine.train_step(1, next(steps), config.optim.lr)
    steps.close()
    return Step(result.loss, result.num_tokens, gradients[0], initial)


def step_conversations(loader: BatchLoader, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids and spans of the conversations of a step, found in its samples by their tokens."""
    found = []
    for sample in map(loader._stream.sample, loader.step_samples(loader.global_batch_size * number)):
        bounds = [*sample.document_starts.tolist(), len(sample.tokens) - sample.padding]
        found += [BY_IDS[sample.tokens[begin : end - 1].tobytes()] for begin, end in pairwise(bounds)]
    return found


def targets_of(ids: np.ndarray, spans: np.ndarray, chat: dict[str, Any]) -> torch.Tensor:
    """Labels of a conversation alone: position i predicts token i + 1."""
    labels = np.full(len(ids), IGNORED_LABEL)
    for begin, end in (spans[-1:] if chat.get("train_on") == "last" else spans).tolist():
        labels[begin:end] = ids[begin:end]
        if not chat.get("train_on_end", True):
            labels[end - 1] = IGNORED_LABEL
    if chat.get("train_on") == "all":
        labels = ids.copy()
    return torch.from_numpy(labels[1:].astype(np.int64))


@lru_cache
def expected(folder: Path, chat_items: tuple[tuple[str, Any], ...]) -> tuple[float, int, Tensors]:
    """Loss, targets and gradients of the first step, one conversation after another."""
    chat = dict(chat_items)
    config = config_of(folder, chat=chat)
    initial = assemble([run_ranks(first_step, 1, config, None)[0].initial])
    model = build_model(config.model)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(initial[name]))
    total, count = torch.zeros(()), 0
    for ids, spans in step_conversations(build_loader(resolve(config), "train"), 0):
        tokens = torch.from_numpy(ids[:-1])[None]
        labels = targets_of(ids, spans, chat)
        logits = model.logits(model(ModelInputs(tokens, counted_positions(tokens)))[0])[0]
        loss = cross_entropy(logits.float(), labels, ignore_index=IGNORED_LABEL, reduction="sum")
        loss.backward()
        total, count = total + loss.detach(), count + int((labels != IGNORED_LABEL).sum())
    gradients = {name: p.grad.numpy() / count for name, p in model.named_parameters() if p.grad is not None}
    return float(total) / count, count, gradients


def differences(
    folder: Path, layout: str, chat: dict[str, Any], mutation: Callable[[], None] | None = None, **keys: Any
):
    """How far the first step of a layout is from single conversations: targets, loss, and the worst tensor."""
    loss, count, gradients = expected(folder, tuple(chat.items()))
    ranks = run_ranks(
        first_step, LAYOUTS[layout][0], config_of(folder, layout, chat, **keys), mutation, timeout_seconds=120
    )
    found = assemble([rank.gradients for rank in ranks])
    return ranks[0].num_tokens - count, abs(ranks[0].loss / loss - 1), worst_tensor(gradients, found, 1e-6)


GRID = [
    pytest.param(
        layout, chat, id=f"{layout}-{chat}", marks=[] if CHOSEN.get(layout) == chat else pytest.mark.whole_grid
    )
    for layout in LAYOUTS
    for chat in ({}, {"train_on": "last"}, {"train_on": "all"}, {"train_on_end": False})
]


@pytest.mark.parametrize(("layout", "chat"), GRID)
def test_packed_conversations_are_single_ones(folder: Path, layout: str, chat: dict[str, Any]) -> None:
    tokens, loss, (name, error) = differences(folder, layout, chat)
    assert tokens == 0 and loss < 1e-5, (tokens, loss)
    assert error < 1e-5, (name, error)


def shift_the_mask() -> None:
    """Targets are the tokens before those that are trained."""
    from llmtrain.data.objectives import chat

    original = chat.trained_tokens
    chat.trained_tokens = lambda *given: np.roll(original(*given), -1)


def drop_the_segments() -> None:
    """Conversations of a sample see those before them."""
    from llmtrain.data import loader

    original = loader.pack_sample

    def without(*given: Any) -> Any:
        row = original(*given)
        row.segments_S = np.minimum(row.segments_S, 0)
        return row

    loader.pack_sample = without


def mean_of_means() -> None:
    """Each rank's tokens normalized by their own number."""
    from llmtrain.engines.torch_engine import TorchEngine

    TorchEngine.sum_over_data = lambda self, count: count


MUTATIONS = [shift_the_mask, drop_the_segments, mean_of_means]


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_what_is_wrong_with_packing_is_caught(folder: Path, mutation: Callable[[], None]) -> None:
    tokens, loss, (_, error) = differences(folder, "dp2", {}, mutation)
    assert loss > 1e-4 and error > 1e-3, (tokens, loss, error)


def test_transformers_trains_the_same_on_single_conversations(folder: Path) -> None:
    """The losses of 20 steps: AdamW with clipped gradients on transformers' Llama, a conversation at a time."""
    config = config_of(folder)
    family = FAMILIES["llama"]
    initial = assemble([run_ranks(first_step, 1, config, None)[0].initial])
    theirs: Any = LlamaForCausalLM(family.to_config(config.model))
    weights = iter_theirs(
        family.tables_for(config.model)[0], config.model, lambda name, _=None: torch.from_numpy(initial[name])
    )
    theirs.load_state_dict(dict(weights), strict=False)
    theirs.tie_weights()
    optim = config.optim
    adamw = torch.optim.AdamW(theirs.parameters(), optim.lr, optim.betas, optim.eps, weight_decay=0.0)
    loader = build_loader(resolve(config), "train")
    engine, steps = build_engine(config), loader.steps(0)
    for step in range(STEPS):
        ours = engine.train_step(step + 1, next(steps), optim.lr)
        total, count = 0.0, 0
        for ids, spans in step_conversations(loader, step):
            labels = targets_of(ids, spans, {})
            logits = theirs(torch.from_numpy(ids[:-1])[None]).logits[0]
            loss = cross_entropy(logits.float(), labels, ignore_index=IGNORED_LABEL, reduction="sum")
            loss.backward()
            total, count = total + loss.item(), count + int((labels != IGNORED_LABEL).sum())
        for parameter in theirs.parameters():
            parameter.grad /= count
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), optim.grad_clip)
        adamw.step()
        adamw.zero_grad()
        assert ours.num_tokens == count and abs(ours.loss - total / count) < 1e-4, step
    steps.close()
