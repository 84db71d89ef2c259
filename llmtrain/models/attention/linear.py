"""Attention without a softmax: f(q) f(k) v, where f(x) = elu(x) + 1 (Katharopoulos et al. 2020, eq. 7).

Keys and values enter a sum of fixed size, so work and memory are linear in the length. In chunks for training, one
position at a time for decoding. Values carry a column of ones along, whose sums are what the weights add up to.

Documents lie one behind the other: the sums start again where a new one begins.

Shape suffixes: B micro-batch, N heads, S sequence, D size of one head, E = D + 1 with the column of ones, C a chunk.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.models.attention.scoring import Visibility

CHUNK = 64


@dataclass(frozen=True, eq=False)
class LinearState:
    """Sum of f(k) v over the keys of the newest document, [B, N, D, E], and that document's number."""

    sums_BNDE: Tensor
    documents_B: Tensor | None = None


def feature_map(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def linear_attention(q_SBND: Tensor, k_SBND: Tensor, v_SBND: Tensor, visible: Visibility) -> Tensor:
    """[S, B, N, D] of a whole sequence; as many key heads as query heads."""
    q, k, v = prepared(q_SBND, k_SBND, v_SBND, visible)
    documents_BS = visible.queries_BS
    if visible.causal:
        out, _ = scan(q, k, v, documents_BS)
    elif documents_BS is None:
        out = q @ (k.mT @ v)
    else:
        # Backwards without the own position: each key of the document is met once.
        behind, _ = scan(q.flip(2), k.flip(2), v.flip(2), documents_BS.flip(1), itself=False)
        out = scan(q, k, v, documents_BS)[0] + behind.flip(2)
    return normalized(out, q_SBND.dtype)


def decode(
    q_SBND: Tensor, k_SBND: Tensor, v_SBND: Tensor, visible: Visibility, state: LinearState | None
) -> tuple[Tensor, LinearState]:
    """(out [S, B, N, D], new state): causal attention of new positions to themselves and to what the state has seen."""
    assert visible.causal and visible.prefix_B is None, "a sum of what was seen knows no later keys"
    q, k, v = prepared(q_SBND, k_SBND, v_SBND, visible)
    documents_BS = visible.queries_BS
    if q.shape[2] > 1:
        out, state = scan(q, k, v, documents_BS, state)
    else:
        out, state = step(q, k, v, documents_BS, state)
    return normalized(out, q_SBND.dtype), state


def prepared(q_SBND: Tensor, k_SBND: Tensor, v_SBND: Tensor, visible: Visibility) -> tuple[Tensor, Tensor, Tensor]:
    """(f(q) [B, N, S, D], f(k), v with ones [B, N, S, E]) in fp32 at least; keys that are padding add nothing."""
    dtype = torch.promote_types(q_SBND.dtype, torch.float32)
    q, k, v = (x.permute(1, 2, 0, 3).to(dtype) for x in (q_SBND, k_SBND, v_SBND))
    q, k, v = feature_map(q), feature_map(k), F.pad(v, (0, 1), value=1.0)
    if visible.keys_BT is not None and visible.queries_BS is None:
        k = k * (visible.keys_BT[:, -k.shape[2] :] >= 0)[:, None, :, None]
    return q, k, v


def normalized(sums_BNSE: Tensor, dtype: torch.dtype) -> Tensor:
    """[S, B, N, D]: weighted values over the sum of the weights; zero where nothing was seen."""
    total = sums_BNSE[..., -1:]
    out = sums_BNSE[..., :-1] / torch.where(total > 0, total, 1.0)
    return out.permute(2, 0, 1, 3).to(dtype)


def scan(
    q: Tensor, k: Tensor, v: Tensor, documents_BS: Tensor | None, state: LinearState | None = None, itself: bool = True
) -> tuple[Tensor, LinearState]:
    """(sums over the keys up to each position [B, N, S, E], the state behind the last), chunk by chunk."""
    outs = []
    for start in range(0, q.shape[2], CHUNK):
        part = slice(start, start + CHUNK)
        documents_BC = None if documents_BS is None else documents_BS[:, part]
        q_BNCD, k_BNCD, v_BNCE = q[:, :, part], k[:, :, part], v[:, :, part]
        # Within the chunk as a masked product; all earlier chunks have left their sums f(k) v in the state:
        #   out_s = f(q_s) (state + sum over t <= s of the chunk f(k_t) v_t).
        weights = (q_BNCD @ k_BNCD.mT).tril(0 if itself else -1)
        if documents_BC is not None:
            weights = weights * (documents_BC[:, None, :, None] == documents_BC[:, None, None, :])
        out = weights @ v_BNCE
        if state is not None:
            out = out + of_document(q_BNCD, documents_BC, state.documents_B) @ state.sums_BNDE
        outs.append(out)
        state = extended(state, k_BNCD, v_BNCE, documents_BC)
    assert state is not None, "a sequence has positions"
    return torch.cat(outs, dim=2), state


def step(
    q: Tensor, k: Tensor, v: Tensor, documents_B1: Tensor | None, state: LinearState | None
) -> tuple[Tensor, LinearState]:
    """The recurrent form for one position: the state takes the key in and answers the query."""
    state = extended(state, k, v, documents_B1)
    return q @ state.sums_BNDE, state


def extended(state: LinearState | None, k: Tensor, v: Tensor, documents_BC: Tensor | None) -> LinearState:
    """The state behind some more keys: what belongs to another document than the last one is forgotten."""
    if documents_BC is None:
        sums = k.mT @ v
        return LinearState(sums if state is None else state.sums_BNDE + sums)
    newest_B = documents_BC[:, -1]
    sums = of_document(k, documents_BC, newest_B).mT @ v
    if state is not None and state.documents_B is not None:
        sums = sums + state.sums_BNDE * (state.documents_B == newest_B)[:, None, None, None]
    return LinearState(sums, newest_B)


def of_document(x_BNCD: Tensor, documents_BC: Tensor | None, document_B: Tensor | None) -> Tensor:
    """Zero but for the positions of one document."""
    if documents_BC is None or document_B is None:
        return x_BNCD
    return x_BNCD * (documents_BC == document_B[:, None])[:, None, :, None]
