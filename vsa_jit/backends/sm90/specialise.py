"""Which kernels a call runs, and what each is compiled for."""

from __future__ import annotations

import functools

import torch

from vsa_jit.backends.sm90 import structs
from vsa_jit.jit.kernel import Kernel

ARCH = "9.0a"
HEAD_DIMS = (64, 128)
# As the sources name them, and as people do.
DTYPES = {torch.bfloat16: "bf16", torch.float16: "half"}
LABELS = {torch.bfloat16: "bf16", torch.float16: "fp16"}

WARP_THREADS = 32
WARPGROUP_THREADS = 128
# Of a thread block on sm_90, from the CUDA programming guide's table of compute capabilities.
MAX_SHARED_MEMORY = 227 * 1024
# Of the forward beside its tiles: barriers, queues, and what the scheduler needs. A multiple of the tiles' alignment.
FORWARD_SMEM_BESIDE_TILES = 3 * 1024
# Of the block means beside the box: the barrier, and what aligns the structure.
MEANS_SMEM_BESIDE_BOX = 128


def kernels_of(dtype: torch.dtype, head_dim: int) -> list[Kernel]:
    """All kernels that such calls may launch, whatever the size of their blocks. They are made ready together."""
    return [block_means(dtype, head_dim), attend_forward(dtype, head_dim)]


def _defines(dtype: torch.dtype, head_dim: int, **others: int) -> tuple[tuple[str, str], ...]:
    numbers = {"VSA_HEAD_DIM": head_dim, "VSA_BOX_TOKENS": structs.BOX_TOKENS, **others}
    return ("VSA_DTYPE", DTYPES[dtype]), *((name, str(number)) for name, number in numbers.items())


def _box_bytes(dtype: torch.dtype, head_dim: int) -> int:
    return structs.BOX_TOKENS * head_dim * dtype.itemsize


@functools.cache
def block_means(dtype: torch.dtype, head_dim: int) -> Kernel:
    return Kernel(
        source="vsa/block_means.cu",
        entry="block_means",
        label=f"block means {LABELS[dtype]} D={head_dim}",
        defines=_defines(dtype, head_dim),
        params=structs.BlockMeansParams,
        threads=WARP_THREADS,
        smem_bytes=_box_bytes(dtype, head_dim) + MEANS_SMEM_BESIDE_BOX,
    )


@functools.cache
def attend_forward(dtype: torch.dtype, head_dim: int) -> Kernel:
    box_bytes = _box_bytes(dtype, head_dim)
    stages = (MAX_SHARED_MEMORY - FORWARD_SMEM_BESIDE_TILES) // box_bytes - structs.CONSUMERS
    # A tile of V waits for the probabilities of its keys: it is held for longer than the K.
    k_stages = stages // 2 - 1
    return Kernel(
        source="vsa/attend_forward.cu",
        entry="attend_forward",
        label=f"forward {LABELS[dtype]} D={head_dim}",
        defines=_defines(
            dtype,
            head_dim,
            VSA_CONSUMERS=structs.CONSUMERS,
            VSA_WORK_TILES=structs.WORK_TILES,
            VSA_KEY_TILE_BYTES=structs.KEY_TILE_BYTES,
            VSA_K_STAGES=k_stages,
            VSA_V_STAGES=stages - k_stages,
        ),
        params=structs.AttendForwardParams,
        threads=(structs.CONSUMERS + 1) * WARPGROUP_THREADS,
        smem_bytes=(stages + structs.CONSUMERS) * box_bytes + FORWARD_SMEM_BESIDE_TILES,
    )
