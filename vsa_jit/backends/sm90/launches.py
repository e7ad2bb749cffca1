"""The functions of the backend, each from the file of its kernels."""

from vsa_jit.backends.sm90.backward import attend_backward, takes_one_pass, transpose_index
from vsa_jit.backends.sm90.coarse import coarse_attend, coarse_attend_backward
from vsa_jit.backends.sm90.forward import attend, block_means
from vsa_jit.backends.sm90.whole import whole

__all__ = [
    "attend",
    "attend_backward",
    "block_means",
    "coarse_attend",
    "coarse_attend_backward",
    "takes_one_pass",
    "transpose_index",
    "whole",
]
