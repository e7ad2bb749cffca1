"""The backend's functions. What has no CUDA kernel yet, Triton's kernels do."""

from vsa_jit.backends.sm90.launches import attend as forward
from vsa_jit.backends.sm90.launches import block_means
from vsa_jit.backends.triton import backward, block_mean_backward, compact, invert, matmul, select

__all__ = [
    "backward",
    "block_mean_backward",
    "block_means",
    "compact",
    "forward",
    "invert",
    "matmul",
    "select",
]
