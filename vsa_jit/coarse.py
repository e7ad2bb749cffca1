"""The coarse branch: attention among block means, which also choose the key blocks of the fine branch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vsa_jit import ops
from vsa_jit.problem import Problem


def coarse_branch(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_sizes: Tensor | None,
    kv_sizes: Tensor | None,
    topk: int,
    *,
    with_output: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Chooses the ``topk`` best key blocks of each query block and, unless it is not wanted, attends the block means.

    Returns:
        ``(q2k_idx, q2k_num, out_c)``: int32 [B, H, n_q, topk] and [B, H, n_q], without gradient; fp32 [B, H, n_q, D],
        softmax(q_c k_cᵀ · scale) v_c over the key blocks that have valid tokens, or None.
    """
    v_or_none = v if with_output else None
    q_c, k_c, v_c, q2k_idx, q2k_num = ops.pool_and_select(q, k, v_or_none, q_sizes, kv_sizes, topk, *problem.static)
    if not with_output:
        return q2k_idx, q2k_num, None
    # The query heads of one key/value head are rows of one attention.
    rows = q_c.reshape(problem.batch, problem.kv_heads, -1, problem.head_dim)
    mask = None
    if kv_sizes is not None:
        has_tokens = kv_sizes > 0
        # Where no block has any, all of them hold a mean of 0: attending those gives the 0 that is wanted.
        mask = (has_tokens | ~has_tokens.any()).expand(rows.shape[2], -1)
    with ops.autocast_off(q.device):
        out_c = F.scaled_dot_product_attention(rows, k_c, v_c, attn_mask=mask, scale=problem.softmax_scale)
    return q2k_idx, q2k_num, out_c.reshape(q_c.shape)
