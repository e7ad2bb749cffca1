"""The one function of this module that is imported from outside; it has gradients too."""

from fastvideo_kernel.block_sparse_attn import block_sparse_attn_from_indices as triton_block_sparse_attn_forward

__all__ = ["triton_block_sparse_attn_forward"]
