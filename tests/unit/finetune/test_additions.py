"""What is added to a model: declared as it is built, beginning as nothing, computed as the papers say."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llmtrain.config.finetune import FinetuneConfig
from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import declare_parameters, parameter_shapes
from llmtrain.finetune.additions import add_trained_parts
from llmtrain.finetune.merging import MergedWeights
from llmtrain.infer.model import build_trained
from llmtrain.models.attention.scoring import Visibility
from llmtrain.models.init import InitialWeights
from llmtrain.models.stack import Pass
from llmtrain.models.transformer import Transformer, build_model
from llmtrain.values.batch import ModelInputs
from llmtrain.values.fragment import Box
from tests.parity.cases import MODELS
from tests.support.samples import tiny_model

LORA: dict[str, Any] = {"method": "lora", "lora": {"rank": 3, "alpha": 6.0}}
OUTPUT: dict[str, Any] = {"method": "adapter", "adapter": {"size": 5}}
BOTH: dict[str, Any] = {"method": "adapter", "adapter": {"size": 5, "placement": "both"}}
PROMPT: dict[str, Any] = {"method": "prompt", "prompt": {"tokens": 4}}
CPU = torch.device("cpu")


class Stirred:
    """Initial weights, in which nothing that is added is zero."""

    def __init__(self, model: ModelConfig, finetune: FinetuneConfig) -> None:
        self.drawn = InitialWeights(model, 1, finetune)

    def global_shape(self, name: str, kind: str) -> tuple[int, ...] | None:
        return self.drawn.global_shape(name, kind)

    def read(self, name: str, kind: str, box: Box) -> torch.Tensor:
        if name.endswith(("lora_b", "_adapter.up.weight", "_adapter.up.bias")):
            shape = self.drawn.global_shape(name, kind)
            assert shape is not None
            whole = torch.randn(shape, generator=torch.Generator().manual_seed(len(name)))
            return whole[tuple(slice(o, o + s) for o, s in zip(box.offsets, box.shape, strict=True))]
        return self.drawn.read(name, kind, box)


def inputs_of(model: ModelConfig) -> ModelInputs:
    tokens = torch.randint(0, model.vocabulary, (2, 16), generator=torch.Generator().manual_seed(3))
    encoder = tokens if model.family == "encoder_decoder" else None
    return ModelInputs(tokens, torch.arange(16).expand(2, 16), encoder_tokens_BT=encoder)


@torch.no_grad()
def logits(model: Transformer) -> torch.Tensor:
    return model.logits(model(inputs_of(model.config))[0])


@pytest.mark.parametrize("name", ["llama", "gpt", "bert", "t5", "top_2", "shared", "switch_t5"])
@pytest.mark.parametrize("section", [LORA, OUTPUT, BOTH, PROMPT], ids=["lora", "output", "both", "prompt"])
def test_it_is_built_as_it_is_declared_and_begins_as_nothing(name: str, section: dict[str, Any]) -> None:
    model, finetune = tiny_model(**MODELS[name]), FinetuneConfig.model_validate(section)
    declared = declare_parameters(model, finetune)
    built = build_model(model)
    add_trained_parts(built, finetune, declared)
    assert {key: tuple(parameter.shape) for key, parameter in built.named_parameters()} == {
        key: parameter.shape for key, parameter in declared.items()
    }
    assert len(declared) > len(parameter_shapes(model))
    before = build_trained(model, InitialWeights(model, 1), CPU)
    after = build_trained(model, InitialWeights(model, 1, finetune), CPU, finetune)
    assert torch.equal(logits(before), logits(after)) == (section is not PROMPT)
    assert not torch.equal(logits(before), logits(build_trained(model, Stirred(model, finetune), CPU, finetune)))


@pytest.mark.parametrize("name", ["llama", "gpt", "bert", "t5", "top_2", "shared", "switch_t5"])
def test_merged_weights_compute_what_the_update_does(name: str) -> None:
    model = tiny_model(**MODELS[name])
    finetune = FinetuneConfig.model_validate({**LORA, "lora": {"rank": 3, "alpha": 0.5, "rslora": True}})
    source = Stirred(model, finetune)
    beside = build_trained(model, source, CPU, finetune)
    merged = build_trained(model, MergedWeights(source, model, finetune), CPU)
    torch.testing.assert_close(logits(merged), logits(beside), rtol=2e-5, atol=2e-5)
    assert (logits(merged) - logits(build_trained(model, source, CPU))).abs().max() > 1e-3


def test_any_box_of_merged_weights_is_that_part_of_them() -> None:
    model, finetune = tiny_model(**MODELS["top_2"]), FinetuneConfig.model_validate(LORA)
    merged = MergedWeights(Stirred(model, finetune), model, finetune)
    for name in ("decoder.layers.0.attention.k.weight", "decoder.layers.1.moe.experts.down"):
        shape = declare_parameters(model)[name].shape
        whole = merged.read(name, "master", Box.whole(shape))
        box = Box(tuple(size // 3 for size in shape), tuple(size // 2 for size in shape))
        part = whole[tuple(slice(o, o + s) for o, s in zip(box.offsets, box.shape, strict=True))]
        torch.testing.assert_close(merged.read(name, "master", box), part)


@torch.no_grad()
def test_an_update_is_scale_times_b_a() -> None:
    model, finetune = tiny_model(), FinetuneConfig.model_validate(LORA)
    built = build_trained(model, Stirred(model, finetune), CPU, finetune)
    linear = built.get_submodule("decoder.layers.0.mlp.down")
    a, b, weight = (linear.get_parameter(name) for name in ("lora_a", "lora_b", "weight"))
    x = torch.randn(4, 2, weight.shape[1])
    torch.testing.assert_close(linear(x), F.linear(x, weight + 2.0 * b @ a), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("section", [OUTPUT, BOTH], ids=["output", "both"])
def test_a_bottleneck_reads_the_sum_or_the_output(section: dict[str, Any]) -> None:
    model, finetune = tiny_model(num_layers=1), FinetuneConfig.model_validate(section)
    built = build_trained(model, Stirred(model, finetune), CPU, finetune)
    assert built.decoder is not None
    layer = built.decoder.layers["0"]
    x, inputs = torch.randn(8, 2, model.hidden_size), inputs_of(model)
    shared = built.decoder.inputs(Visibility(True), inputs.positions_BS[:, :8], x, Pass())
    y = layer.attention(layer.attention_norm(x), shared.attention)
    h = x + y + (layer.attention_adapter(y) if section is BOTH else 0)
    y = layer.mlp(layer.mlp_norm(h))
    expected = h + y + layer.mlp_adapter(y if section is BOTH else h + y)
    torch.testing.assert_close(layer(x, shared)[0], expected)


@torch.no_grad()
def test_a_prompt_takes_the_place_of_the_first_embeddings() -> None:
    model, finetune = tiny_model(), FinetuneConfig.model_validate(PROMPT)
    built = build_trained(model, Stirred(model, finetune), CPU, finetune)
    assert built.embeddings is not None and built.embeddings.prompt is not None
    inputs = inputs_of(model)
    x = built.embeddings(inputs.tokens_BS, inputs.positions_BS, None, "decoder")
    assert torch.equal(x[:4, 0], built.embeddings.prompt.weight)
    assert torch.equal(x[4:].transpose(0, 1), built.embeddings.word(inputs.tokens_BS[:, 4:]))
