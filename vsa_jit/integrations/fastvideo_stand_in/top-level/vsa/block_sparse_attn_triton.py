"""The function that other packages import from this module; here it has gradients too."""

from fastvideo_kernel.block_sparse_attn import block_sparse_attn_from_indices as triton_block_sparse_attn_forward

__all__ = ["triton_block_sparse_attn_forward"]
