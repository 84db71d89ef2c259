"""Full attention through PyTorch's fused kernels.

Shape suffixes: S queries, T keys, B micro-batch, N heads, D size of one head.
"""

import torch.nn.functional as F
from torch import Tensor

from llmtrain.models.attention.scores import Scoring, repeated_kv


def fused_attention(q_SBND: Tensor, k_TBND: Tensor, v_TBND: Tensor, scoring: Scoring) -> Tensor:
    """softmax(scale q k^T) v, [S, B, N, D]; no mask is made where all, or all earlier, keys are seen."""
    visible, (num_queries, num_keys) = scoring.visible, (q_SBND.shape[0], k_TBND.shape[0])
    k, v = repeated_kv(k_TBND, q_SBND.shape[2]), repeated_kv(v_TBND, q_SBND.shape[2])
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SBND, k, v))
    ordered = visible.causal and visible.prefix_B is None
    if visible.keys_BT is None and (not visible.causal or (ordered and num_queries in (1, num_keys))):
        is_causal = visible.causal and num_queries > 1
        out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scoring.scale)
        return out.permute(2, 0, 1, 3)
    mask_BST = visible.allowed(num_queries, num_keys, q.device)
    assert mask_BST is not None, "something is left out"
    blind_BS1 = None
    if visible.may_see_nothing:
        # A softmax over nothing is no number, and its gradient neither: such a query sees all, and is then forgotten.
        blind_BS1 = ~mask_BST.any(-1, keepdim=True)
        mask_BST = mask_BST | blind_BS1
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_BST[:, None], scale=scoring.scale)
    if blind_BS1 is not None:
        out = out.masked_fill(blind_BS1[:, None], 0.0)
    return out.permute(2, 0, 1, 3)
