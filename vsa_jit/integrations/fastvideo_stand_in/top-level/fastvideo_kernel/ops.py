"""The whole operator, selecting in the dtype of its inputs."""

from typing import Any

from torch import Tensor

import vsa_jit
from fastvideo_kernel._absent import absent


def video_sparse_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    variable_block_sizes: Tensor,
    q_variable_block_sizes: Tensor,
    topk: int,
    block_size: int | tuple[int, int, int] = 64,
    compress_attn_weight: Tensor | None = None,
) -> Tensor:
    """``vsa_jit.video_sparse_attn`` with FastVideo's arguments.

    Args:
        q, k, v: [B, H, S, D], blocks padded to full size one after the other.
        variable_block_sizes, q_variable_block_sizes: valid tokens of each block of keys and of queries.
        topk: key blocks to attend for each query block, clamped to their number.
        block_size: a tile (t, h, w), or the side of a cube.
        compress_attn_weight: weight of the coarse output, of q's shape; None for 1.

    Returns:
        Of q's shape and dtype; 0 where a query is padding.
    """
    return vsa_jit.video_sparse_attn(
        q,
        k,
        v,
        variable_block_sizes,
        q_variable_block_sizes,
        topk,
        _tile(block_size),
        compress_attn_weight,
        selection_dtype=q.dtype,
    )


def video_sparse_attn_bshd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    variable_block_sizes: Tensor,
    q_variable_block_sizes: Tensor,
    topk: int,
    block_size: int | tuple[int, int, int] = 64,
    compress_attn_weight: Tensor | None = None,
) -> Tensor:
    """``video_sparse_attn`` of [B, S, H, D]."""
    return vsa_jit.video_sparse_attn(
        q,
        k,
        v,
        variable_block_sizes,
        q_variable_block_sizes,
        topk,
        _tile(block_size),
        compress_attn_weight,
        layout="bshd",
        selection_dtype=q.dtype,
    )


def _tile(block_size: int | tuple[int, int, int]) -> tuple[int, int, int]:
    return (block_size,) * 3 if isinstance(block_size, int) else block_size


def __getattr__(name: str) -> Any:
    if name == "sliding_tile_attention":
        raise absent(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
