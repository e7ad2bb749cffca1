"""Video Sparse Attention by vsa_jit, under the names of FastVideo's kernels; see the README of this distribution."""

from typing import Any

from fastvideo_kernel._absent import absent
from fastvideo_kernel.block_sparse_attn import block_sparse_attn, block_sparse_attn_from_indices
from fastvideo_kernel.block_sparse_attn_varlen import block_sparse_attn_varlen
from fastvideo_kernel.ops import video_sparse_attn, video_sparse_attn_bshd
from fastvideo_kernel.vsa_utils import (
    VSA_TILE_SIZE,
    build_vsa_metadata,
    construct_variable_block_sizes,
    get_non_pad_index,
    get_reverse_tile_partition_indices,
    get_tile_partition_indices,
)

__all__ = [
    "VSA_TILE_SIZE",
    "block_sparse_attn",
    "block_sparse_attn_from_indices",
    "block_sparse_attn_varlen",
    "build_vsa_metadata",
    "construct_variable_block_sizes",
    "get_non_pad_index",
    "get_reverse_tile_partition_indices",
    "get_tile_partition_indices",
    "video_sparse_attn",
    "video_sparse_attn_bshd",
]

# The release of fastvideo-kernel whose interface this is.
__version__ = "0.3.5+vsa.jit"

# What else that release has at the top: other attentions, layers and communication.
_NOT_SERVED = {
    "FastLayerNorm",
    "FastRMSNorm",
    "Int8Linear",
    "comm_ops",
    "int8_linear",
    "int8_quant",
    "moba_attn_varlen",
    "process_moba_input",
    "process_moba_output",
    "sliding_tile_attention",
    "turbodiffusion_ops",
    "vmoba",
}


def __getattr__(name: str) -> Any:
    if name in _NOT_SERVED:
        raise absent(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
