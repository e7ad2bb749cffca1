"""The coarse branch: attention among block means, which also choose the key blocks of the fine branch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vsa_jit.ops.pooling import block_means
from vsa_jit.ops.selection import coarse_attend
from vsa_jit.problem import Problem


def coarse_branch(
    problem: Problem,
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_sizes: Tensor | None,
    kv_sizes: Tensor | None,
    topk: Sequence[int],
    *,
    with_output: bool,
    compete: bool = False,
    selection_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Chooses the best key blocks of each query block and, unless it is not wanted, attends the block means.

    The second operator sees nothing but the means: between the two, whoever shards a sequence can gather them.

    Args:
        topk, compete: as in ``coarse_attend``.

    Returns:
        ``(q2k_idx, q2k_num, out_c)``: int32 [B, H, n_q, m] and [B, H, n_q], without gradient; fp32 [B, H, n_q, D],
        softmax(q_c k_cᵀ · scale) v_c over the key blocks that have valid tokens, or None. With a narrower
        ``selection_dtype`` every step was rounded to it.
    """
    q_c, k_c, v_c = block_means(q, k, v if with_output else None, q_sizes, kv_sizes, *problem.static, backend)
    out_c, q2k_idx, q2k_num = coarse_attend(
        q_c,
        k_c,
        v_c if with_output else None,
        kv_sizes,
        topk,
        compete,
        selection_dtype,
        *problem.static_of_blocks,
        backend,
    )
    return q2k_idx, q2k_num, out_c if with_output else None
