"""PyTorch's flash operators below its public function: signatures that we rely on, and which calls they take."""

import pytest
import torch
from torch import Tensor

from llmtrain.models.attention.fused_blocks import can_fuse, flash, flash_gradients
from llmtrain.models.attention.patterns import Full, SlidingWindow
from llmtrain.models.attention.scoring import Scoring, Visibility

CPU_FORWARD = "query key value dropout_p is_causal attn_mask scale"
CPU_BACKWARD = "grad_out query key value out logsumexp dropout_p is_causal attn_mask scale"
GPU_FORWARD = "query key value dropout_p is_causal return_debug_mask scale"
GPU_BACKWARD = (
    "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p is_causal philox_seed "
    "philox_offset scale"
)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("_scaled_dot_product_flash_attention_for_cpu", CPU_FORWARD),
        ("_scaled_dot_product_flash_attention_for_cpu_backward", CPU_BACKWARD),
        ("_scaled_dot_product_flash_attention", GPU_FORWARD),
        ("_scaled_dot_product_flash_attention_backward", GPU_BACKWARD),
    ],
)
def test_operators_take_what_they_are_given(name: str, arguments: str) -> None:
    schema = getattr(torch.ops.aten, name).default._schema
    assert " ".join(argument.name for argument in schema.arguments) == arguments


def qkv(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, length, 16, generator=generator).to(dtype) for length in (12, 20, 20)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_part_take_the_log_sum_of_the_whole(dtype: torch.dtype) -> None:
    """Keys in two parts: the gradients of the parts are those of the whole."""
    q, k, v = qkv(dtype)
    whole, log_sum = flash(q, k, v, False, 0.25)
    assert log_sum.dtype == torch.float32 and log_sum.shape == (2, 4, 12)
    grad_out = torch.randn_like(whole)
    grad_q, grad_k, grad_v = flash_gradients(grad_out, (q, k, v, whole, log_sum), False, 0.25)
    parts = []
    for keys in (slice(0, 8), slice(8, 20)):
        kept = (q, k[:, :, keys], v[:, :, keys], whole, log_sum)
        parts.append(flash_gradients(grad_out, kept, False, 0.25))
    near = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(parts[0][0] + parts[1][0], grad_q, **near)
    for number, expected in ((1, grad_k), (2, grad_v)):
        torch.testing.assert_close(torch.cat([part[number] for part in parts], 2), expected, **near)


def test_only_plain_scores_and_order_are_fused() -> None:
    q_sBND = torch.empty(8, 2, 4, 16)
    seen = Visibility()
    assert can_fuse(q_sBND, Scoring(Full(), seen, 1.0))
    assert can_fuse(q_sBND, Scoring(Full(), Visibility(causal=False), 1.0))
    documents = torch.zeros(2, 8, dtype=torch.long)
    for scoring in (
        Scoring(SlidingWindow(4), seen, 1.0),
        Scoring(Full(), seen, 1.0, softcap=2.0),
        Scoring(Full(), seen, 1.0, sinks_N=torch.zeros(4)),
        Scoring(Full(), Visibility(True, documents, documents), 1.0),
        Scoring(Full(), Visibility(True, prefix_B=torch.ones(2)), 1.0),
    ):
        assert not can_fuse(q_sBND, scoring)
