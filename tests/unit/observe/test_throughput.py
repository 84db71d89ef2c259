import pytest

from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import FrozenNames
from llmtrain.config.sequence_lengths import Lengths
from llmtrain.observe.monitor import flops_per_sample, mfu, peak_flops

LLAMA_3_8B = ModelConfig(
    num_layers=32,
    hidden_size=4096,
    num_heads=32,
    num_kv_heads=8,
    ffn_hidden_size=14336,
    vocab_size=128256,
    tie_embeddings=False,
)


def test_llama_3_8b_costs_the_published_58_gflop_per_token():
    assert flops_per_sample(LLAMA_3_8B, Lengths(8192)) / 8192 / 1e9 == pytest.approx(57.9, abs=0.05)


def test_weights_that_are_frozen_have_no_gradient() -> None:
    whole, frozen = (flops_per_sample(LLAMA_3_8B, Lengths(1), names) for names in (None, FrozenNames(("*",))))
    attention = 12 * 32 * 128 * 32
    assert (frozen - attention) * 6 == (whole - attention) * 4
    layers = flops_per_sample(LLAMA_3_8B, Lengths(1), FrozenNames(("decoder.layers.*",)))
    assert layers - frozen == 2 * 4096 * 128256, "the head's"


def test_the_published_throughput_of_an_h100_is_its_published_mfu():
    peak = peak_flops("NVIDIA H100 80GB HBM3")
    assert peak is not None
    assert mfu(10_254, flops_per_sample(LLAMA_3_8B, Lengths(8192)) / 8192, peak) == pytest.approx(0.600, abs=0.001)


def test_a_plain_mlp_and_full_attention_are_counted_term_by_term():
    config = ModelConfig(num_layers=2, hidden_size=8, num_heads=2, activation="gelu", vocab_size=10)
    per_layer = 4 * 8 * 8 + 2 * 8 * 32
    assert flops_per_sample(config, Lengths(16)) / 16 == 6 * (2 * per_layer + 8 * 10) + 12 * 2 * 8 * 16


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("Tesla V100-SXM2-16GB", 125),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("cpu", None),
    ],
)
def test_peaks(name: str, tera: int | None):
    assert peak_flops(name) == (None if tera is None else tera * 1e12)
