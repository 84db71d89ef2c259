"""A model's graphs, run by PyTorch as they are, compute what the model computes."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from llmtrain.config.attention import ATTENTION_KINDS, SCALING_KINDS
from llmtrain.config.model import ModelConfig, MoeConfig
from llmtrain.config.reading.load import load_config
from llmtrain.errors import ConfigError, ExportError
from llmtrain.infer.graphs.model_graphs import model_graphs
from llmtrain.interop.graphs.folder import require_graphs
from llmtrain.interop.graphs.memory import GraphModel
from llmtrain.interop.graphs.ports import Graph
from llmtrain.interop.graphs.proof import GraphComparison, compare_graphs
from llmtrain.models.attention import dense
from llmtrain.models.attention.dense import DenseKeys, TextPlaces
from llmtrain.models.attention.patterns import SlidingWindow
from llmtrain.models.experts.router import Router
from tests.configs.test_shipped_configs import MODELS as SHIPPED
from tests.configs.test_shipped_configs import run_around
from tests.unit.infer.graphs.models import KINDS, REFUSED, calm, eager, original
from tests.unit.interop.models import LLAMA, SIZES, VOCAB_SIZE, random_model


def compared(config: ModelConfig, spoil: tuple[Any, str, Any] | None = None) -> GraphComparison:
    """`spoil` is an attribute that is another one while graphs run: the model computes what it did."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(VOCAB_SIZE, (301,), generator=generator).tolist()
    right, graphs = original(config), model_graphs(random_model(config))

    def run(graph: Graph, inputs: Sequence[Tensor]) -> list[Tensor]:
        with pytest.MonkeyPatch.context() as patch:
            if spoil is not None:
                patch.setattr(*spoil)
            return eager(graph, inputs)

    found = compare_graphs(GraphModel(graphs, run), right, ids, "float32")
    found.require("float32", 1e-6)
    return found


CHOICES = ("family", "position", "norm", "norm_position", "activation", "gelu_approximate", "head")
"""Keys of a model that name a kind."""

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


def test_every_kind_has_graphs_or_is_refused_by_name() -> None:
    """One that is added to the configuration has to be in one of the two lists."""
    with pytest.raises(ConfigError, match="expert_choice: each expert chooses among all tokens"):
        require_graphs(REFUSED["expert choice"])
    for config in KINDS.values():
        require_graphs(config)
    seen = [config.model_dump() for config in (*KINDS.values(), *REFUSED.values())]
    for key in CHOICES:
        declared = set(get_args(ModelConfig.model_fields[key].annotation))
        assert {found[key] for found in seen} == declared, key
    assert {found["attention"]["kind"] for found in seen} == set(ATTENTION_KINDS)
    assert {found["rope_scaling"]["kind"] for found in seen if found["rope_scaling"]} == set(SCALING_KINDS)
    routers = set(get_args(MoeConfig.model_fields["router"].annotation))
    assert {found["moe"]["router"] for found in seen if found["moe"]} == routers


def in_small(config: ModelConfig) -> ModelConfig:
    """Another architecture's kinds in the sizes of the tests, groups of queries and experts with them."""
    layers = config.moe.every_n_layers if config.moe else 1
    sizes: dict[str, Any] = {
        **SIZES, "num_layers": 2 * layers, "num_kv_heads": 4 if config.kv_heads == config.num_heads else 2,
        "head_dim": 16 if config.head_dim else None, "vocab_size": VOCAB_SIZE,
    }  # fmt: skip
    if config.family == "encoder_decoder":
        sizes["num_encoder_layers"] = 2 * layers
    if config.moe:
        sizes["moe"] = config.moe.with_keys({"num_experts": 4, "ffn_hidden_size": None})
    if config.attention.window:
        sizes["attention"] = config.attention.with_keys({"window": 9})
    if config.rope_scaling:
        sizes["rope_scaling"] = config.rope_scaling.with_keys({"original_max_seq_len": 16})
    small = config.with_keys(sizes)
    return calm(small) if small.activation == "geglu" else small


@pytest.mark.whole_grid
def test_every_shipped_model_in_small(tmp_path: Path) -> None:
    small = [in_small(load_config(run_around(file, tmp_path)).config.model) for file in SHIPPED]
    kinds = {str(config): config for config in small}
    assert len(kinds) >= 8
    for config in kinds.values():
        compared(config)


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
    found = compare_graphs(graphs, original(LLAMA), list(range(5, 200)), "int8")
    assert 1e-4 < found.perplexity_increase < 1 and found.num_equal_best < found.num_positions
    found.require("int8", 1.0)
    with pytest.raises(ExportError, match=r"perplexity rises by .* --max-perplexity-increase = 0.0001"):
        found.require("int8", 1e-4)
