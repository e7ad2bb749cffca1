"""``block_sparse_attn`` for blocks of 128 and 256 tokens, [B, H, S, D] or [B, S, H, D]; lse is [B, H, S] in both."""

from torch import Tensor

from fastvideo_kernel.block_sparse_attn import attend_map


def block_sparse_attn_128(
    q: Tensor, k: Tensor, v: Tensor, logical_block_map_128: Tensor, logical_variable_block_sizes_128: Tensor
) -> tuple[Tensor, Tensor]:
    return attend_map(q, k, v, logical_block_map_128, logical_variable_block_sizes_128, 128, "bhsd")


def block_sparse_attn_128_bshd(
    q: Tensor, k: Tensor, v: Tensor, logical_block_map_128: Tensor, logical_variable_block_sizes_128: Tensor
) -> tuple[Tensor, Tensor]:
    return attend_map(q, k, v, logical_block_map_128, logical_variable_block_sizes_128, 128, "bshd")


def block_sparse_attn_256(
    q: Tensor, k: Tensor, v: Tensor, logical_block_map_256: Tensor, logical_variable_block_sizes_256: Tensor
) -> tuple[Tensor, Tensor]:
    return attend_map(q, k, v, logical_block_map_256, logical_variable_block_sizes_256, 256, "bhsd")


def block_sparse_attn_256_bshd(
    q: Tensor, k: Tensor, v: Tensor, logical_block_map_256: Tensor, logical_variable_block_sizes_256: Tensor
) -> tuple[Tensor, Tensor]:
    return attend_map(q, k, v, logical_block_map_256, logical_variable_block_sizes_256, 256, "bshd")
