import math
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.t5.modeling_t5 import T5Attention

from llmtrain.config.attention import RopeScaling
from llmtrain.config.model import ModelConfig
from llmtrain.models import positions
from llmtrain.models.attention import patterns
from llmtrain.models.positions import (
    Alibi,
    RelativeBias,
    alibi_slopes,
    relative_buckets,
    rotary_angles,
    rotary_frequencies,
    rotate,
    sent,
    sinusoids,
)
from llmtrain.parallel.stateless_random import Draws
from tests.support.samples import tiny_model


def test_rotation_equals_complex_multiplication() -> None:
    """Su et al. 2021, eq. 12: the pair (x[i], x[i + D/2]) as a complex number times e^(i m theta_i)."""
    torch.manual_seed(0)
    config = tiny_model(head_dim=8)
    positions_BS = torch.tensor([[0, 1, 5, 9], [3, 2, 1, 0]])
    x_SBND = torch.randn(4, 2, 4, 8)
    turned = rotate(x_SBND, rotary_angles(config, positions_BS, torch.float32))
    for s in range(4):
        for b in range(2):
            for i in range(4):
                angle = float(positions_BS[b, s]) * 10000.0 ** (-2 * i / 8)
                turn = complex(math.cos(angle), math.sin(angle))
                pair = torch.complex(x_SBND[s, b, :, i], x_SBND[s, b, :, i + 4]) * turn
                torch.testing.assert_close(turned[s, b, :, i], pair.real)
                torch.testing.assert_close(turned[s, b, :, i + 4], pair.imag)


def test_scores_depend_on_distance_only() -> None:
    torch.manual_seed(0)
    config = tiny_model(head_dim=16)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(query_at: int, key_at: int) -> torch.Tensor:
        turned_q = rotate(q, rotary_angles(config, torch.tensor([[query_at]]), torch.float32))
        turned_k = rotate(k, rotary_angles(config, torch.tensor([[key_at]]), torch.float32))
        return (turned_q * turned_k).sum()

    torch.testing.assert_close(score(7, 3), score(57, 53))
    assert not torch.allclose(score(7, 3), score(7, 4))


def test_rotation_gradient_is_right() -> None:
    torch.manual_seed(0)
    rotary = rotary_angles(tiny_model(head_dim=8), torch.arange(3)[None], torch.float64)
    x = torch.randn(3, 1, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, rotary), (x,))


def test_sinusoids_equal_the_papers_formula() -> None:
    table = sinusoids(torch.tensor([[0, 1, 7]]), 6)
    assert table.shape == (3, 1, 6)
    for s, position in enumerate((0, 1, 7)):
        for i in range(3):
            angle = position / 10000 ** (2 * i / 6)
            assert table[s, 0, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[s, 0, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def theirs(config: ModelConfig, rope: dict[str, Any], seq_len: int | None = None) -> tuple[torch.Tensor, float]:
    """Frequencies and factor as transformers computes them."""
    hf = LlamaConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        head_dim=config.head_size,
        max_position_embeddings=2048,
        rope_parameters={"rope_theta": config.rope_theta, **rope},
    )
    return ROPE_INIT_FUNCTIONS[rope["rope_type"]](hf, torch.device("cpu"), seq_len)


STRETCHED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"kind": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    (
        {"kind": "llama3", "factor": 8.0, "original_max_seq_len": 8192},
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    (
        {
            "kind": "llama3", "factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 3.0,
            "original_max_seq_len": 500,
        },
        {
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 3.0,
            "original_max_position_embeddings": 500,
        },
    ),
    (
        {"kind": "yarn", "factor": 4.0, "original_max_seq_len": 2048},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
    ),
    (
        {"kind": "yarn", "factor": 40.0, "original_max_seq_len": 4096, "beta_fast": 16.0, "beta_slow": 2.0,
         "attention_factor": 1.25},
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 16.0,
         "beta_slow": 2.0, "attention_factor": 1.25},
    ),
    (
        {"kind": "yarn", "factor": 1.0, "original_max_seq_len": 16},  # all bounds fall outside of the pairs
        {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 16},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("ours", "rope"), STRETCHED)
@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_stretched_frequencies_equal_those_of_transformers(
    ours: dict[str, Any], rope: dict[str, Any], head_dim: int, theta: float
) -> None:
    config = tiny_model(head_dim=head_dim, rope_theta=theta, rope_scaling=RopeScaling(**ours))
    frequencies, factor = theirs(config, rope)
    torch.testing.assert_close(rotary_frequencies(config), frequencies, rtol=1e-6, atol=0)
    positions_BS = torch.tensor([[0, 1, 17, 300]])
    angles = positions_BS.T[:, :, None, None].float() * rotary_frequencies(config)
    rotary = rotary_angles(config, positions_BS, torch.float32)
    torch.testing.assert_close(rotary.cos, angles.cos() * factor, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rotary.sin, angles.sin() * factor, rtol=1e-6, atol=1e-6)


def test_ntk_equals_the_dynamic_form_at_the_length_where_its_base_is_ours() -> None:
    """transformers lets the factor grow with the length: at 5 times the original, one of 1 has become 5."""
    config = tiny_model(head_dim=64, rope_scaling=RopeScaling(kind="ntk", factor=5.0))
    frequencies, _ = theirs(config, {"rope_type": "dynamic", "factor": 1.0}, seq_len=5 * 2048)
    torch.testing.assert_close(rotary_frequencies(config), frequencies, rtol=1e-6, atol=0)
    plain = rotary_frequencies(tiny_model(head_dim=64))
    assert rotary_frequencies(config)[0] == plain[0]
    torch.testing.assert_close(rotary_frequencies(config)[-1], plain[-1] / 5)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (64, 256), (8, 20), (4, 16), (6, 100)])
def test_relative_buckets_equal_those_of_transformers(bidirectional: bool, buckets: int, furthest: int) -> None:
    away = torch.arange(-3 * furthest, 3 * furthest + 1)
    expected = T5Attention._relative_position_bucket(away, bidirectional, buckets, furthest)
    assert torch.equal(relative_buckets(away, bidirectional, buckets, furthest), expected)


def test_relative_bias_is_the_weight_of_the_bucket_and_the_head() -> None:
    bias = RelativeBias(tiny_model(relative_buckets=8, relative_max_distance=20), bidirectional=True)
    bias.weight.data.normal_()
    queries, keys = torch.tensor([3, 30]), torch.arange(40)
    scores = bias.scores(queries, keys, 0, 4)
    assert scores.shape == (4, 2, 40)
    for n, s, t in ((0, 0, 0), (3, 1, 39), (2, 0, 39), (1, 1, 30)):
        bucket = relative_buckets(keys[t] - queries[s], True, 8, 20)
        assert scores[n, s, t] == bias.weight[bucket, n]
    part = RelativeBias(tiny_model(relative_buckets=8, relative_max_distance=20), bidirectional=True)
    part.weight, part.first_head = torch.nn.Parameter(bias.weight[:, 2:].detach()), 2
    assert torch.equal(part.scores(queries, keys, 3, 1), scores[3:])


PUBLISHED_SLOPES = {
    8: [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256],  # Press et al. 2022, section 3
    4: [1 / 4, 1 / 16, 1 / 64, 1 / 256],
    6: [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8],
}


@pytest.mark.parametrize("num_heads", sorted(PUBLISHED_SLOPES))
def test_alibi_slopes_equal_the_published_ones(num_heads: int) -> None:
    assert alibi_slopes(num_heads) == PUBLISHED_SLOPES[num_heads]


@pytest.mark.parametrize("num_heads", [1, 2, 3, 12, 16, 20, 40, 112])
def test_alibi_slopes_equal_those_of_transformers(num_heads: int) -> None:
    """Bloom's are the authors' (build_alibi_tensor holds them in the last position's column 1)."""
    theirs = build_alibi_tensor(torch.ones(1, 2), num_heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(torch.tensor(alibi_slopes(num_heads)), theirs, rtol=1e-6, atol=0)


def test_alibi_falls_with_the_distance_to_both_sides_by_the_slope_of_the_global_head() -> None:
    scores = Alibi(6).scores(torch.tensor([5]), torch.arange(9), 4, 2)
    away = torch.tensor([5.0, 4, 3, 2, 1, 0, 1, 2, 3])
    torch.testing.assert_close(scores, torch.stack((-away / 2, -away / 8))[:, None])


def test_scores_by_position_depend_on_the_distance_alone() -> None:
    """The kernels rely on it: they are given one row of distances."""
    learned = RelativeBias(tiny_model(), bidirectional=False)
    learned.weight.data.normal_()
    for bias in (learned, Alibi(4)):
        near = bias.scores(torch.arange(5), torch.arange(7), 0, 4)
        assert torch.equal(near, bias.scores(torch.arange(5) + 90, torch.arange(7) + 90, 0, 4))


class BlockingCopies(TorchDispatchMode):
    """Counts copies from the CPU to another device for which the host waits."""

    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if func.overloadpacket.__name__ == "_to_copy" and args[0].device != options.get("device", args[0].device):
            self.found += not options.get("non_blocking", False)
        return func(*args, **options)


def test_nothing_about_positions_and_draws_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the host would wait in every micro-batch, and the next one would begin late."""
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    on_gpu: list[torch.device] = []

    def to_both(x: torch.Tensor, device: torch.device) -> torch.Tensor:
        on_gpu.append(sent(x, gpu).device)
        return x

    with monkeypatch.context() as patched, FakeTensorMode(allow_non_fake_inputs=True), BlockingCopies() as copies:
        patched.setattr(torch.Tensor, "pin_memory", lambda x: x)  # there is no GPU to pin it for
        for module in (positions, patterns):
            patched.setattr(module, "sent", to_both)
        rotary_angles(tiny_model(), torch.arange(8).expand(2, -1), torch.float32)
        Alibi(4).scores(torch.arange(8), torch.arange(8), 0, 4)
        patterns.BigBird(4, 1, 1).rule(8, cpu)
        assert on_gpu == [gpu] * 3
        assert Draws.of_micro_batch(1, 2, 3, gpu).key.device == gpu
        assert copies.found == 0
        torch.empty(3).to(gpu)
    assert copies.found == 1, "it would be seen"
