"""Compiled layers: nothing is unpickled from disk, nobody else's files are used, and all layers share their graphs."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from torch import nn
from torch._dynamo.utils import counters

from llmtrain.config.finetune import FinetuneConfig
from llmtrain.config.parameters import declare_parameters
from llmtrain.finetune.additions import add_trained_parts
from llmtrain.models.attention.multi_head import join_projections
from llmtrain.models.compiled_graphs import CACHE_VARIABLE, compile_layers, dropped
from llmtrain.models.stack import Pass
from llmtrain.models.transformer import build_model
from llmtrain.parallel.stateless_random import Draws, dropout_hidden, site_key
from tests.support.samples import random_batch, tiny_model

JITTERED = {"num_experts": 4, "router": "switch", "capacity_factor": 1.0, "jitter": 0.01, "every_n_layers": 1}


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A home without a cache, and PyTorch's settings as they are by default."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(CACHE_VARIABLE, "")
    monkeypatch.delenv(CACHE_VARIABLE)
    with inductor_config.patch(fx_graph_cache=True), functorch_config.patch(enable_autograd_cache=True):
        yield tmp_path / "llmtrain" / "compiled"


def test_no_graph_is_unpickled_and_kernels_lie_in_a_private_folder(untouched: Path) -> None:
    compile_layers([nn.Linear(2, 2)])
    assert not inductor_config.fx_graph_cache
    assert not functorch_config.enable_autograd_cache
    assert os.environ[CACHE_VARIABLE] == str(untouched)
    assert untouched.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_may_write_to_is_closed(untouched: Path) -> None:
    untouched.mkdir(parents=True)
    untouched.chmod(0o777)
    compile_layers([])
    assert untouched.stat().st_mode & 0o777 == 0o700


def test_the_users_own_folder_is_used(untouched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "/scratch/compiled")
    compile_layers([])
    assert os.environ[CACHE_VARIABLE] == "/scratch/compiled"
    assert not untouched.exists()


FEW, MANY = 3, 12
"""Layers. PyTorch gives up compiling a function after its eighth graph."""


def graphs(
    num_layers: int,
    recompute: str = "none",
    joint: bool = False,
    finetune: FinetuneConfig | None = None,
    **changes: Any,
) -> dict[str, int]:
    """How many graphs all layers of a model with dropout take in two steps, and how often the compiler gave up."""
    torch._dynamo.reset()
    counters.clear()
    model = build_model(tiny_model(num_layers=num_layers, dropout=0.1, **changes), recompute)
    add_trained_parts(model, finetune, declare_parameters(model.config, finetune))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    if joint:
        join_projections(model, move=True)
    for layer in (layer for stack in model.stacks for layer in stack.layers.values()):
        layer.compile(backend="eager")
    for step in (1, 2):
        draws = Draws.of_micro_batch(1, step, 0, torch.device("cpu"))
        model(random_batch(), Pass(draws))[0].sum().backward()
    given_up = counters["frames"]["total"] - counters["frames"]["ok"]
    return {"graphs": counters["stats"]["unique_graphs"], "given up": given_up}


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_layers_with_dropout_share_one_graph(recompute: str) -> None:
    assert graphs(MANY, recompute) == {"graphs": 1, "given up": 0}


def test_layers_with_joint_products_share_one_graph() -> None:
    """As on a GPU: each layer has a matrix that is none of its parameters, over the memory of three that are."""
    assert graphs(MANY, joint=True) == {"graphs": 1, "given up": 0}


@pytest.mark.parametrize(
    "section",
    [
        {"method": "lora", "lora": {"rank": 4, "dropout": 0.1}},
        {"method": "lora", "lora": {"rank": 4, "targets": ["attention.q", "attention.v"]}},
        {"method": "adapter", "adapter": {"size": 8, "placement": "both"}},
    ],
)
def test_layers_with_what_finetuning_adds_share_one_graph(section: dict[str, Any]) -> None:
    finetune = FinetuneConfig.model_validate(section)
    assert graphs(MANY, finetune=finetune) == {"graphs": 1, "given up": 0}
    assert graphs(MANY, "full", finetune=finetune) == {"graphs": 1, "given up": 0}


def test_attention_dropout_takes_no_more_graphs_in_more_layers() -> None:
    """What a graph cannot hold splits a layer into several, the same of each layer."""
    assert graphs(MANY, attention_dropout=0.1) == graphs(FEW, attention_dropout=0.1)


@pytest.mark.whole_grid
def test_the_compiler_does_not_give_up_layers_with_experts() -> None:
    """How many graphs they take depends on how many tokens each expert gets."""
    assert graphs(MANY, moe=JITTERED)["given up"] == 0


def test_a_dropout_is_one_graph_for_all_sites_and_steps_and_the_same_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU where layers are not compiled."""
    torch._dynamo.reset()
    counters.clear()
    built = torch.compile(dropout_hidden, backend="aot_eager", dynamic=False)
    monkeypatch.setattr("llmtrain.models.compiled_graphs.compiled", lambda function: built)
    x = torch.randn(8, 2, 16)
    for step in (1, 2):
        for site in ("attention", "mlp"):
            draws = Draws.of_micro_batch(1, step, 0, torch.device("cpu"))
            results, grads = [], []
            for fused in (False, True):
                monkeypatch.setattr("llmtrain.models.compiled_graphs.is_fused", lambda x, chosen=fused: chosen)
                leaf = x.clone().requires_grad_()
                results.append(dropped(leaf, 0.5, site_key(site), draws))
                results[-1].sum().backward()
                grads.append(leaf.grad)
            assert torch.equal(*results)
            assert torch.equal(*grads)
            assert 0.2 < (results[0] == 0).float().mean() < 0.8
    assert counters["stats"]["unique_graphs"] == 1
    assert dropped(x, 0.5, site_key("mlp"), None) is x
