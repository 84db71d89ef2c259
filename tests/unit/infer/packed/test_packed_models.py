"""Whole models with packed matrices: logits within the bounds, the same tokens, and nothing depends on a crowd."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.errors import ConfigError
from llmtrain.infer.batching.request import Request
from llmtrain.infer.batching.sampling import Sampling
from llmtrain.infer.batching.scheduler import Limits
from llmtrain.infer.generate import iter_tokens
from llmtrain.infer.model import TrainedModel, logits_of
from llmtrain.infer.packed import choice, linears
from llmtrain.infer.packed.choice import KernelChoice
from llmtrain.infer.packed.products import sums_are_exact
from llmtrain.models.transformer import build_model
from tests.unit.infer.batching.test_batch import requests, run
from tests.unit.infer.packed.quantized_models import MODELS, found_model
from tests.unit.interop.models import random_example

CPU = torch.device("cpu")
PACKED = KernelChoice("packed")
SCHEMES = ("w8a16", "w8a8", "w4a16")
CASES = [(name, scheme) for name in ("llama", "gpt2", "mixtral", "t5") for scheme in SCHEMES]


@pytest.fixture(autouse=True)
def exact_sums() -> None:
    if not sums_are_exact():
        pytest.skip("this CPU has no VNNI")


def both(name: str, scheme: str) -> tuple[TrainedModel, TrainedModel]:
    found = found_model(MODELS[name], scheme)
    return found.read(CPU), found.read(CPU, PACKED)


def difference(name: str, scheme: str) -> float:
    """Of the logits of the packed model, in parts of what is allowed: 1e-5 of the largest logit; where the last bit
    decides how an input is rounded, half of what rounding changes; in bfloat16 what a model of that type differs by."""
    found, example = found_model(MODELS[name], scheme), random_example(MODELS[name])
    plain, packed = (logits_of(found.read(CPU, kernels).model, example) for kernels in (None, PACKED))
    if scheme == "w8a16":
        return float((packed - plain).abs().max() / plain.abs().max()) / 1e-5
    if scheme == "w8a8":
        other = logits_of(replace(found, rounded=frozenset()).read(CPU).model, example)
        return 2 * float((packed - plain).norm() / (other - plain).norm())
    other = logits_of(found.read(CPU).model.to(torch.bfloat16), example).float()
    return float((packed - plain).norm() / (other - plain).norm())


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_logits_are_within_the_bound(name: str, scheme: str) -> None:
    assert 0 < difference(name, scheme) <= 1


def _greedy(trained: TrainedModel, seed: int) -> list[int]:
    config = trained.model.config
    ids = tuple(random.Random(seed).randrange(300) for _ in range(9))
    prompt, source = ((0,), ids) if config.family == "encoder_decoder" else (ids, ())
    return list(iter_tokens(trained, Request(prompt, 24, Sampling(0), source=source)))


@pytest.mark.parametrize(
    ("name", "scheme"), [case for case in CASES if case[1] != "w4a16" and case != ("mixtral", "w8a8")]
)
def test_greedy_tokens_are_those_of_the_dequantized_model(name: str, scheme: str) -> None:
    plain, packed = both(name, scheme)
    for seed in range(3):
        assert _greedy(packed, seed) == _greedy(plain, seed)


@pytest.mark.parametrize(("name", "scheme"), [("llama", "w8a16"), ("llama", "w4a16"), ("gpt2", "w8a8"),
                                              ("mixtral top 2", "w4a16"), ("t5", "w4a16")])  # fmt: skip
def test_a_crowd_changes_no_bit(name: str, scheme: str) -> None:
    model = found_model(MODELS[name], scheme).read(CPU, PACKED).model
    asked = [
        replace(each, max_tokens=8, prompt=each.prompt[-40:])
        for each in requests(random.Random(0), model.has_memory, 6)
    ]
    asked = [replace(each, source=each.source[-40:]) for each in asked]
    alone, expected = run(model, Limits.of(model.config, 1, exact=True), asked)
    together, actual = run(model, Limits.of(model.config, 5, exact=True), asked, random.Random(1))
    assert len(together) > 3 and all(tokens == alone[number] for number, tokens in together.items())
    assert all(torch.equal(row, expected[place]) for place, row in actual.items() if place[0] in together)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_take_the_memory_of_their_bits(scheme: str) -> None:
    found = found_model(MODELS["llama"], scheme)
    trained = found.read(CPU, PACKED)
    plain = sum(parameter.nbytes for parameter in found.read(CPU).model.parameters())
    modules = [module for module in trained.model.modules() if isinstance(module, linears.PackedLinear)]
    assert len(modules) == 14, "all linears of two layers"
    packed = sum(module.product.num_bytes for module in modules)
    left = sum(parameter.nbytes for parameter in trained.model.parameters())
    assert packed < (plain - left) / (4 if scheme == "w4a16" else 3.5), "of fp32, with scales that groups of 32 have"
    assert trained.identity != found.read(CPU).identity, "what is gone on with was computed by the same kernels"


def test_a_product_that_forgets_the_bias_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = linears.PackedLinear.forward

    def without_bias(self: Any, x: Tensor) -> Tensor:
        return forward(self, x) - (0 if self.bias is None else self.bias)

    monkeypatch.setattr(linears.PackedLinear, "forward", without_bias)
    assert difference("gpt2", "w4a16") > 1


def test_experts_that_change_places_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    put = linears.put_experts
    monkeypatch.setattr(
        choice, "put_experts",
        lambda model, name, products: put(model, name, {own: each[::-1] for own, each in products.items()}),
    )  # fmt: skip
    assert difference("mixtral", "w4a16") > 1


class TestChoice:
    """What is packed, and what is said where it is not."""

    def told(self, scheme: str, asked: KernelChoice, group: int | None = 32, name: str = "llama") -> str:
        found = found_model(MODELS[name], scheme, group)
        packing = choice.MatrixPacking(asked, found.matrices, CPU)
        packing.put_into(build_model(found.config))
        return packing.told

    def test_by_kernel(self) -> None:
        assert self.told("w8a16", PACKED).startswith("14 of 14 matrices multiplied as 8-bit numbers with exact sums, ")
        assert self.told("w4a16", PACKED).startswith("14 of 14 matrices multiplied as 4-bit numbers in bfloat16, ")
        assert "8-bit numbers" in self.told("w4a16", PACKED, group=None), "a scale for each output"
        assert self.told("w4a16", PACKED, name="mixtral").startswith("14 of 14 matrices multiplied as 4-bit")

    def test_auto_takes_what_is_faster(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.told("w8a8", KernelChoice("auto")) == "14 of 14 matrices dequantized: too small to be faster"
        monkeypatch.setattr(choice, "FAST_WHOLE", 64 * 96)
        assert "6 of 14 matrices multiplied as 8-bit" in self.told("w8a8", KernelChoice("auto"))
        assert "6 of 14 matrices multiplied as 8-bit" in self.told("w8a16", KernelChoice("auto"))
        assert "6 of 14 matrices multiplied as 8-bit" in self.told("w8a8", KernelChoice("auto", "reading"))
        assert self.told("w8a16", KernelChoice("auto", "reading")).endswith("dequantized: too small to be faster")
        monkeypatch.setattr(choice, "FAST_DIGITS", 64 * 96)
        assert "6 of 14 matrices multiplied as 8-bit" in self.told("w8a16", KernelChoice("auto", "reading"))
        monkeypatch.setattr(choice, "FAST_FOUR_BIT", 64 * 96)
        assert "6 of 14 matrices multiplied as 4-bit" in self.told("w4a16", KernelChoice("auto"))
        assert self.told("w4a16", KernelChoice("auto", "reading")).endswith("reading is not faster with 4 bits")

    def test_forms_without_a_kernel(self) -> None:
        with pytest.raises(ConfigError, match=r"nothing to pack: kernels know a scale .* 32, 64, 128, 256 inputs"):
            self.told("w4a16", PACKED, group=16)
        assert self.told("w4a16", KernelChoice("plain")) == "14 of 14 matrices dequantized: so it was asked for"

    def test_a_cpu_that_loses_bits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(choice, "sums_are_exact", lambda: False)
        with pytest.raises(ConfigError, match="no VNNI"):
            self.told("w8a16", PACKED)
        assert "4-bit" in self.told("w4a16", PACKED), "this kernel has no such sums"

    def test_a_model_that_is_not_quantized(self) -> None:
        found = replace(found_model(MODELS["llama"], "w8a16"), matrices=None)
        with pytest.raises(ConfigError, match="no matrix of the model is in whole numbers"):
            found.read(CPU, PACKED)
        assert found.read(CPU, KernelChoice("auto")).identity == found.read(CPU).identity
