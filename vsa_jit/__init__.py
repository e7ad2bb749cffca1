"""Video Sparse Attention that works from one ``pip install``: kernels are compiled for the GPU that is found."""

from vsa_jit.api import (
    block_sparse_attn,
    block_sparse_attn_from_indices,
    explain,
    video_sparse_attn,
)
from vsa_jit.backends.choose import Choice

__all__ = [
    "Choice",
    "block_sparse_attn",
    "block_sparse_attn_from_indices",
    "explain",
    "video_sparse_attn",
]
