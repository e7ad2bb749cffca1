"""Video Sparse Attention by vsa_jit, under the names of the package that came before fastvideo-kernel."""

import torch
from fastvideo_kernel import ops
from fastvideo_kernel.block_sparse_attn import block_sparse_attn
from torch import Tensor

__all__ = ["block_sparse_attn", "torch_attention", "video_sparse_attn"]


def video_sparse_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    variable_block_sizes: Tensor,
    topk: int,
    block_size: int | tuple[int, int, int],
    compress_attn_weight: Tensor | None = None,
) -> Tensor:
    """``fastvideo_kernel.video_sparse_attn`` of self-attention: the same sizes for queries and keys."""
    return ops.video_sparse_attn(
        q, k, v, variable_block_sizes, variable_block_sizes, topk, block_size, compress_attn_weight
    )


def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Dense attention of few tokens, such as block means, [B, H, n, D], by plain PyTorch in their dtype.

    Returns:
        ``(out, p)``: out like q; p [B, H, n_q, n_k], the probabilities.
    """
    p = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)
    return p @ v, p
