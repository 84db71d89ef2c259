"""Linear attention: the chunked, the recurrent and the quadratic form are one."""

import pytest
import torch

from llmtrain.config.attention import AttentionConfig
from llmtrain.models.attention.linear import LinearState, decode, linear_attention
from llmtrain.models.attention.multi_head import AttentionInputs
from llmtrain.models.attention.scoring import Visibility
from tests.unit.models.attention.attention_cases import BATCH, built, documents, random_qkv, visibility
from tests.unit.models.attention.dense_attention import LENGTH, dense_mask, gradients
from tests.unit.models.attention.dense_attention import linear_attention as quadratic

pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("restriction", ["none", "documents", "padding"])
def test_chunks_equal_the_quadratic_definition(causal: bool, restriction: str) -> None:
    visible, (q, k, v) = visibility(causal, restriction), random_qkv(2)
    ours = built(attention={"kind": "linear"}).attend(q, k, v, AttentionInputs(visible=visible))
    theirs = quadratic((q, k, v), dense_mask(AttentionConfig(kind="linear"), visible, BATCH, LENGTH, LENGTH))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(ours, [q, k, v]), gradients(theirs, [q, k, v]))


@pytest.mark.parametrize("restriction", ["none", "documents", "padding"])
def test_one_position_at_a_time_equals_chunks(restriction: str) -> None:
    (q, k, v), visible, state = random_qkv(4), visibility(True, restriction), None
    whole = linear_attention(q, k, v, visible)
    for s in range(LENGTH):
        part = slice(s, s + 1)
        queries = None if visible.queries_BS is None else visible.queries_BS[:, part]
        seen = Visibility(True, queries, None if visible.keys_BT is None else visible.keys_BT[:, : s + 1])
        out, state = decode(q[part], k[part], v[part], seen, state)
        torch.testing.assert_close(out, whole[part])


def test_the_state_has_the_size_of_a_head_whatever_was_seen() -> None:
    q, k, v = random_qkv(4)
    _, state = decode(q, k, v, Visibility(), None)
    assert isinstance(state, LinearState)
    assert state.sums_BNDE.shape == (BATCH, 4, 8, 9)


def test_a_document_forgets_the_one_before() -> None:
    """What stands in another document changes nothing, though it is summed in the same chunks."""
    q, k, v = random_qkv(4)
    numbers = documents()
    visible = Visibility(True, numbers, numbers)
    before = linear_attention(q, k, v, visible)
    with torch.no_grad():
        k[:9, 0] += 1  # all of the first document of the first sample, inside of chunk 2
        after = linear_attention(q, k, v, visible)
    assert not torch.allclose(before[1:9, 0], after[1:9, 0])
    assert torch.equal(before[9:, 0], after[9:, 0])
    assert torch.equal(before[:, 1], after[:, 1])
