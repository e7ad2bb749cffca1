"""Attention of blocks of 64 tokens over the key blocks of a map or of indices."""

import math
from typing import Literal

import torch
from torch import Tensor

import vsa_jit
from fastvideo_kernel.triton_kernels.index import map_to_index

BLOCK = 64


def block_sparse_attn(
    q: Tensor, k: Tensor, v: Tensor, block_map: Tensor, variable_block_sizes: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention over the key blocks that a map names.

    Args:
        q, k, v: [B, H, S, D], blocks of 64 tokens one after the other.
        block_map: [B, H, n_q, n_k] or [H, n_q, n_k], of any dtype; a block is attended where it is not 0.
        variable_block_sizes: [n_k], valid tokens of each key block. Every query counts.

    Returns:
        ``(out, lse)``: out like q; lse as ``in_base_2``.
    """
    return attend_map(q, k, v, block_map, variable_block_sizes, BLOCK, "bhsd")


def block_sparse_attn_from_indices(
    q: Tensor, k: Tensor, v: Tensor, q2k_idx: Tensor, q2k_num: Tensor, variable_block_sizes: Tensor
) -> tuple[Tensor, Tensor]:
    """The same from indices [B, H, n_q, m], of which ``q2k_num`` [B, H, n_q] count in each row."""
    out, lse = vsa_jit.block_sparse_attn_from_indices(q, k, v, q2k_idx, q2k_num, variable_block_sizes, block_size=BLOCK)
    return out, in_base_2(lse)


# FastVideo's tests and benchmarks take these two by name.
block_sparse_attn_triton = block_sparse_attn_from_indices
_map_to_index = map_to_index


def attend_map(
    q: Tensor, k: Tensor, v: Tensor, block_map: Tensor, sizes: Tensor, block: int, layout: Literal["bhsd", "bshd"]
) -> tuple[Tensor, Tensor]:
    """As ``block_sparse_attn``, for blocks of any size and either layout."""
    out, lse = vsa_jit.block_sparse_attn(q, k, v, block_map.bool(), sizes, block_size=block, layout=layout)
    return out, in_base_2(lse)


def in_base_2(lse: Tensor) -> Tensor:
    """A natural log-sum-exp [B, H, S], fp32, to base 2; the lowest finite number for a query without keys."""
    return (lse * math.log2(math.e)).clamp(min=torch.finfo(lse.dtype).min)
