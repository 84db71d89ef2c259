import math

import pytest
import torch
from torch import Tensor

from llmtrain.models.attention import Attention, AttentionInputs, LayerCache, document_mask, fused_attention
from llmtrain.models.positions import rotary_angles
from llmtrain.parallel.draws import Draws
from tests.support.samples import tiny_model


def slow_attention(q_SBND: Tensor, k_SBND: Tensor, v_SBND: Tensor, segments_BS: Tensor | None = None) -> Tensor:
    """Attention position by position, straight from the definition."""
    out = torch.zeros_like(q_SBND)
    group = q_SBND.shape[2] // k_SBND.shape[2]
    for s in range(q_SBND.shape[0]):
        for b in range(q_SBND.shape[1]):
            for n in range(q_SBND.shape[2]):
                seen = [t for t in range(s + 1) if segments_BS is None or segments_BS[b, t] == segments_BS[b, s]]
                scores = k_SBND[seen, b, n // group] @ q_SBND[s, b, n] / math.sqrt(q_SBND.shape[-1])
                out[s, b, n] = scores.softmax(0) @ v_SBND[seen, b, n // group]
    return out


def built(dtype: torch.dtype = torch.float64, **changes: object) -> Attention:
    torch.manual_seed(0)
    return Attention(tiny_model(**changes), layer_number=0).to(dtype)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4], ids=["mqa", "gqa", "mha"])
def test_attention_equals_its_definition(num_kv_heads: int) -> None:
    torch.manual_seed(0)
    attention = built(num_kv_heads=num_kv_heads)
    q = torch.randn(6, 2, 4, 8, dtype=torch.float64)
    k, v = (torch.randn(6, 2, num_kv_heads, 8, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(attention.attend(q, k, v, AttentionInputs()), slow_attention(q, k, v))


def test_documents_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    segments_BS = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 1, 2, 2, 2]])
    q, k, v = (torch.randn(6, 2, 4, 8, dtype=torch.float64) for _ in range(3))
    out = fused_attention(q, k, v, document_mask(segments_BS))
    torch.testing.assert_close(out, slow_attention(q, k, v, segments_BS))


@pytest.mark.parametrize("bias", [False, True])
def test_gradient_is_right(bias: bool) -> None:
    attention = built(hidden_size=8, num_heads=2, num_kv_heads=1, bias=bias)
    angles = rotary_angles(tiny_model(hidden_size=8, num_heads=2), torch.arange(3)[None], torch.float64)
    inputs = AttentionInputs(angles)
    x = torch.randn(3, 1, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: attention(x, inputs), (x, *attention.parameters()))


def test_future_positions_change_nothing() -> None:
    attention = built()
    x = torch.randn(6, 1, 32, dtype=torch.float64)
    changed = x.clone()
    changed[4:] += 1
    before, after = attention(x, AttentionInputs()), attention(changed, AttentionInputs())
    torch.testing.assert_close(before[:4], after[:4], rtol=0, atol=0)
    assert not torch.allclose(before[4:], after[4:])


def test_a_cache_gives_the_same_numbers_as_the_whole_sequence() -> None:
    attention = built()
    x = torch.randn(7, 2, 32, dtype=torch.float64)
    whole = attention(x, AttentionInputs())
    cache = LayerCache(max_seq_len=7)
    parts = [attention(x[a:b], AttentionInputs(), cache) for a, b in ((0, 3), (3, 4), (4, 7))]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_dropped_probabilities_are_the_explicit_path_without_the_dropped() -> None:
    """With a mask that keeps all, the explicit path equals the fused kernel; with the real one, it differs."""
    attention = built(attention_dropout=0.5, num_kv_heads=4)
    q, k, v = (torch.randn(6, 2, 4, 8, dtype=torch.float64) for _ in range(3))
    draws = Draws.of_micro_batch(0, 1, 0, torch.device("cpu"))
    dropped = attention.attend(q, k, v, AttentionInputs(draws=draws))
    fused = fused_attention(q, k, v, None)
    assert not torch.allclose(dropped, fused)
    attention.dropout = 2.0**-40
    torch.testing.assert_close(attention.attend(q, k, v, AttentionInputs(draws=draws)), fused, rtol=1e-6, atol=1e-6)
