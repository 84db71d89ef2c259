"""A model's graphs, run by PyTorch as they are, compute what the model computes."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.config.model import ModelConfig, MoeConfig
from llmtrain.errors import ConfigError, ExportError
from llmtrain.infer.batching.request import Request
from llmtrain.infer.batching.sampling import Sampling
from llmtrain.infer.embedding import embedding
from llmtrain.infer.generate import iter_tokens
from llmtrain.infer.graphs.model_graphs import model_graphs
from llmtrain.infer.model import logits_of
from llmtrain.interop.graph import Graph
from llmtrain.interop.graph_folder import require_graphs
from llmtrain.interop.graph_memory import GraphModel
from llmtrain.interop.graph_proof import GraphComparison, OriginalModel, compare_graphs
from llmtrain.models.attention import dense
from llmtrain.models.attention.dense import DenseKeys, TextPlaces
from llmtrain.models.attention.patterns import SlidingWindow
from llmtrain.models.experts.router import Router
from tests.unit.infer.graphs.models import KINDS
from tests.unit.interop.models import LLAMA, MIXTRAL, VOCAB_SIZE, random_model

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


def trained(config: ModelConfig) -> OriginalModel:
    model = random_model(config)

    def continued(ids: Sequence[int], count: int) -> list[int]:
        encodes = config.family == "encoder_decoder"
        prompt, source = ((START_ID,), tuple(ids)) if encodes else (tuple(ids), ())
        return list(iter_tokens(model, Request(prompt, count, Sampling(0.0), source=source)))

    return OriginalModel(config, partial(logits_of, model), continued, partial(embedding, model), START_ID)


def compared(config: ModelConfig, spoil: tuple[Any, str, Any] | None = None) -> GraphComparison:
    """`spoil` is an attribute that is another one while graphs run: the model computes what it did."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(VOCAB_SIZE, (301,), generator=generator).tolist()
    right, graphs = trained(config), model_graphs(random_model(config))

    def run(graph: Graph, inputs: Sequence[Tensor]) -> list[Tensor]:
        with pytest.MonkeyPatch.context() as patch:
            if spoil is not None:
                patch.setattr(*spoil)
            return eager(graph, inputs)

    found = compare_graphs(GraphModel(graphs, run), right, ids, exact=True)
    found.require(True, 1e-6)
    return found


SHORT = ("llama", "alibi", "bigbird", "linear", "sinks and cap", "mixtral", "bert answers", "bert classifier", "t5")


@pytest.mark.parametrize(
    "name", [name if name in SHORT else pytest.param(name, marks=pytest.mark.whole_grid) for name in KINDS]
)
def test_graphs_compute_what_the_model_computes(name: str) -> None:
    """Rows of different lengths, from the memory of earlier tokens, and greedily beside `llmtrain generate`."""
    found = compared(KINDS[name])
    writes = KINDS[name].family != "encoder" and not KINDS[name].predicts_labels
    assert found.num_equal_best == found.num_positions > 6
    assert found.num_greedy == (32 if writes else 0)


def test_expert_choice_is_refused() -> None:
    config = MIXTRAL.with_keys({"moe": MoeConfig(router="expert_choice", num_experts=4)})
    with pytest.raises(ConfigError, match="expert_choice: each expert chooses among all tokens"):
        require_graphs(config)
    require_graphs(MIXTRAL)


def shifted_queries(of):
    return lambda mask, count, longest: replace(found := of(mask, count, longest), queries_BS=found.queries_BS + 1)


def put_before(self: DenseKeys, k_SBND: Tensor, v_SBND: Tensor) -> None:
    new, before = (k_SBND.permute(1, 2, 0, 3), v_SBND.permute(1, 2, 0, 3)), self.pair
    self.pair = new if before is None else (torch.cat((new[0], before[0]), 2), torch.cat((new[1], before[1]), 2))


@pytest.mark.parametrize(
    ("name", "owner", "what", "wrong"),
    [
        ("llama", TextPlaces, "of", staticmethod(shifted_queries(TextPlaces.of))),
        ("alibi", TextPlaces, "scores", lambda self, by_distance_NR: by_distance_NR[None, :, :1, None]),
        ("window", SlidingWindow, "near", lambda self, s, t: (s - t).abs() < self.window + 1),
        ("llama", DenseKeys, "append", put_before),
        ("linear", dense, "last", lambda x_BT, count: torch.ones_like(x_BT[:, :count])),
        ("mixtral", Router, "weights", lambda self, x_SBH: torch.full((*x_SBH.shape[:2], 5), 0.2)),
    ],
)
def test_what_is_wrong_is_found(name: str, owner: Any, what: str, wrong: Any) -> None:
    """Places, scores by position, a pattern that sees one key more, a memory in the wrong order, padding, routing."""
    with pytest.raises((ExportError, IndexError)):  # a score of a distance that there is not
        compared(KINDS[name], (owner, what, wrong))


def test_rounded_weights_are_measured_and_bounded() -> None:
    model = random_model(LLAMA)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.03)
    graphs = GraphModel(model_graphs(model), eager)
    found = compare_graphs(graphs, trained(LLAMA), list(range(5, 200)), exact=False)
    assert 1e-4 < found.perplexity_increase < 1 and found.num_equal_best < found.num_positions
    found.require(False, 1.0)
    with pytest.raises(ExportError, match=r"perplexity rises by .* --max-perplexity-increase = 0.0001"):
        found.require(False, 1e-4)
