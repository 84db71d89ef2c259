"""A run with a section `quantize`, read by whoever does not train: all of them compute what training computed with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.checkpoint.find import find_checkpoint
from llmtrain.checkpoint.reader import CheckpointReader
from llmtrain.checkpoint.saved_run import saved_finetune, saved_precision, saved_quantize
from llmtrain.compress.source import open_source
from llmtrain.config.schema import RunConfig
from llmtrain.engines.torch_engine import TorchEngine
from llmtrain.errors import CheckpointError
from llmtrain.infer.graphs.exporting import export_graphs
from llmtrain.infer.hugging_face import open_trained, rounding_notes, trained_weights
from llmtrain.infer.model import build_trained, load_model
from llmtrain.interop.graphs.folder import GraphSettings
from llmtrain.interop.graphs.ports import Graph, Stages
from llmtrain.models.transformer import Transformer
from llmtrain.values.batch import Batch
from tests.support.evaluated_run import trained_run
from tests.support.samples import hidden_states, random_batch
from tests.support.small_runs import train_here
from tests.unit.infer.graphs.models import eager

CPU = torch.device("cpu")
W4, W8 = {"scheme": "w4a16", "group": 16}, {"scheme": "w8a16", "keep": ["attention.q"]}
LORA = {"method": "lora", "lora": {"rank": 4, "train_also": ["*norm*"]}}
ADAPTER = {"method": "adapter", "adapter": {"size": 8, "placement": "both"}}
MOE = {"model": {"moe": {"num_experts": 2, "ffn_hidden_size": 32, "num_shared_experts": 1}}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return trained_run(tmp_path_factory.mktemp("base"), train={"steps": 12}, checkpoint={"every_steps": 12})


def rounded_run(base: RunConfig, name: str, keys: dict[str, Any]) -> RunConfig:
    """A run on a base's weights, with a section `quantize`."""
    finetune = {"base": str(base.run_dir), **keys.pop("finetune", {})}
    steps = {"train.steps": 8, "checkpoint.every_steps": 8, "optim.lr": 1e-2}
    config = base.with_keys({"name": name, "finetune": finetune, **steps, **keys})
    assert train_here(config) == 0
    return config


def as_trained(config: RunConfig, batch: Batch) -> Tensor:
    """The logits of the engine that trains the run, at its last checkpoint."""
    engine = TorchEngine(config, CPU)
    engine.load(find_checkpoint(config.run_dir))
    return logits(engine.model.eval(), batch)


@torch.no_grad()
def logits(model: Transformer, batch: Batch) -> Tensor:
    return model.logits(hidden_states(model, batch)).float()[..., : model.config.vocabulary]


def require_equal(found: Tensor, expected: Tensor) -> None:
    """But for the order of sums."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


CASES: dict[str, dict[str, Any]] = {
    "lora": {"finetune": LORA, "quantize": W4},
    "adapter": {"finetune": ADAPTER, "quantize": W8},
    "full": {"quantize": W4},
    "frozen in part": {"quantize": W8, "optim.freeze": ["decoder.layers.0.*"]},
}


@pytest.mark.parametrize("name", CASES)
def test_who_reads_it_computes_what_training_computed(base: RunConfig, name: str) -> None:
    config, batch = rounded_run(base, name.replace(" ", "-"), dict(CASES[name])), random_batch(2, 24)
    expected, found = as_trained(config, batch), load_model(config.run_dir, CPU)
    require_equal(logits(found.model, batch), expected)
    checkpoint = find_checkpoint(config.run_dir)
    plain = build_trained(config.model, checkpoint, CPU, saved_finetune(checkpoint))
    assert (logits(plain, batch) - expected).abs().max() > 1e-3, "rounding changes what the model says"


@pytest.mark.parametrize("sections", [{}, MOE], ids=["dense", "experts"])
def test_inputs_are_rounded_as_they_were(sections: dict[str, Any], tmp_path: Path) -> None:
    steps = {"train": {"steps": 12}, "checkpoint": {"every_steps": 12}}
    config, batch = trained_run(tmp_path, **steps, **sections, quantize={"scheme": "w8a8"}), random_batch(2, 24)
    expected = as_trained(config, batch)
    require_equal(logits(load_model(config.run_dir, CPU).model, batch), expected)
    weights_alone = open_source(config.run_dir, None)
    assert weights_alone.trained_for is not None and weights_alone.dtype == "float32"


def test_an_export_to_hugging_face_is_the_rounded_base_with_its_updates(base: RunConfig) -> None:
    config, batch = rounded_run(base, "merged", dict(CASES["lora"])), random_batch(2, 24)
    checkpoint, trained = open_trained(config.run_dir, None)
    read = trained_weights(checkpoint, trained.config).read
    with torch.no_grad():
        engine = TorchEngine(config.with_keys({"finetune": None, "quantize": None}), CPU)
        for name, parameter in engine.parameters.items():
            parameter.copy_(read(name))
    require_equal(logits(engine.model.eval(), batch), as_trained(config, batch))
    assert rounding_notes(checkpoint) == ["the base is the one that was trained on: rounded to w4a16"]
    source = open_source(config.run_dir, None)
    assert source.trained_for is None, "compressed as any model: its sums are no whole numbers"
    assert torch.equal(source.read("decoder.layers.1.mlp.down.weight"), read("decoder.layers.1.mlp.down.weight"))


@pytest.mark.parametrize("name", ["lora", "adapter"])
def test_graphs_are_of_the_rounded_base(base: RunConfig, name: str, tmp_path: Path) -> None:
    config, batch = rounded_run(base, f"graph-{name}", dict(CASES[name])), random_batch(2, 24)

    class Seen(Exception):
        pass

    found: list[Graph] = []

    def write(folder: Path, graphs: Sequence[Graph], precision: str) -> Stages:
        found.extend(graphs)
        raise Seen

    with pytest.raises(Seen):
        export_graphs(config.run_dir, tmp_path / "out", None, GraphSettings("onnx", "float32", 0.02, False), write)
    (graph,) = found
    inputs = [batch.tokens_BS, torch.ones_like(batch.tokens_BS)]
    sizes = {"batch": 2, "past": 0}
    inputs += [torch.zeros(port.shape(sizes), dtype=port.dtype) for port in graph.memory]
    require_equal(eager(graph, inputs)[0], as_trained(config, batch))


def damaged(checkpoint: CheckpointReader, old: str, new: str) -> CheckpointReader:
    assert old in checkpoint.config_text
    checkpoint.config_text = checkpoint.config_text.replace(old, new)
    return checkpoint


def test_a_configuration_that_says_nothing_known_is_an_error(tmp_path: Path) -> None:
    steps = {"train": {"steps": 1}, "checkpoint": {"every_steps": 1}}
    config = trained_run(tmp_path, **steps, quantize=W4)
    for old, new, key in (
        ("precision: fp32", "precision: int3", "train.precision of its configuration: must be one of fp32, bf16"),
        ("precision: fp32", "precision: [fp32]", "train.precision of its configuration: must be one of fp32, bf16"),
        ("scheme: w4a16", "scheme: w2a16", "quantize.scheme of its configuration: "),
    ):
        with pytest.raises(CheckpointError, match=key):
            checkpoint = damaged(find_checkpoint(config.run_dir), old, new)
            saved_precision(checkpoint), saved_quantize(checkpoint)
