"""Video Sparse Attention that works from one ``pip install``: kernels are compiled for the GPU that is found."""

from vsa_jit.api import (
    block_sparse_attn,
    block_sparse_attn_from_indices,
    explain,
    recall,
    video_sparse_attn,
    warmup,
)
from vsa_jit.backends.choose import Choice
from vsa_jit.jit.errors import CacheError, CompileError
from vsa_jit.steps import block_means, map_to_indices, select_blocks

__version__ = "0.1.0"

__all__ = [
    "CacheError",
    "Choice",
    "CompileError",
    "__version__",
    "block_means",
    "block_sparse_attn",
    "block_sparse_attn_from_indices",
    "explain",
    "map_to_indices",
    "recall",
    "select_blocks",
    "video_sparse_attn",
    "warmup",
]
