"""Means of the blocks of q, k and v, in one launch: parameters, specialisation and launch of ``vsa/block_means.cu``."""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from vsa_jit.backends.sm90.tiles import (
    BOX_TOKENS,
    HeadSteps,
    Place,
    Sizes,
    box_of,
    map_of,
    place_of,
    sizes_of,
    tile_of,
    video_of,
)
from vsa_jit.jit import module
from vsa_jit.jit.driver import Launcher, TensorMap
from vsa_jit.jit.kernel import Kernel
from vsa_jit.problem import Problem, Side, axes

HEAD_DIMS = (64, 128)
# As the sources name them, and as people do.
DTYPES = {torch.bfloat16: "bf16", torch.float16: "half"}
LABELS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
THREADS = 32
# The barrier, and what aligns the structure.
SMEM_BESIDE_BOX = 128


class _Operand(ctypes.Structure):
    _fields_ = (
        ("mean", ctypes.c_void_p),
        ("sizes", ctypes.c_void_p),
        ("sizes_are_64_bit", ctypes.c_int),
        ("num_items", ctypes.c_int),
        ("num_blocks", ctypes.c_int),
        ("heads", ctypes.c_int),
        ("width", ctypes.c_int),
        ("tiles_w", ctypes.c_int),
        ("steps", HeadSteps),
    )


class Params(ctypes.Structure):
    """``Params`` of the source, whose comments say what each is."""

    _fields_ = (
        ("maps", TensorMap * 3),
        ("operands", _Operand * 3),
        ("frames", ctypes.c_int),
        ("height", ctypes.c_int),
        ("tiles_h", ctypes.c_int),
        ("tile", ctypes.c_int * 3),
        ("box", ctypes.c_int * 3),
        ("heads_first", ctypes.c_int),
        ("padding", ctypes.c_uint8 * 48),
    )


@functools.cache
def block_means_kernel(dtype: torch.dtype, head_dim: int) -> Kernel:
    return Kernel(
        source="vsa/block_means.cu",
        entry="block_means",
        label=f"block means {LABELS[dtype]} D={head_dim}",
        defines=(("VSA_DTYPE", DTYPES[dtype]), ("VSA_HEAD_DIM", str(head_dim))),
        params=Params,
        threads=THREADS,
        smem_bytes=BOX_TOKENS * head_dim * dtype.itemsize + SMEM_BESIDE_BOX,
    )


def block_means(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor | None, q_sizes: Tensor | None, kv_sizes: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    q_c = q.new_empty(
        (problem.batch, problem.queries.heads, problem.queries.num_blocks, problem.head_dim), dtype=torch.float32
    )
    k_c = k.new_empty(
        (problem.batch, problem.keys.heads, problem.keys.num_blocks, problem.head_dim), dtype=torch.float32
    )
    v_c = None if v is None else torch.empty_like(k_c)
    prepared = _prepared(
        problem,
        q.dtype,
        q.get_device(),
        *map(place_of, (q, k, v)),
        *map(sizes_of, (q_sizes, kv_sizes)),
    )
    params = Params.from_buffer_copy(prepared.params)
    for operand, mean in zip(params.operands, (q_c, k_c, v_c), strict=True):
        operand.mean = None if mean is None else mean.data_ptr()
    prepared.launch(prepared.blocks, params)
    return q_c, k_c, v_c


class _Prepared(NamedTuple):
    """All of a launch but where the means go."""

    params: Params
    blocks: int
    launch: Launcher


@functools.lru_cache(maxsize=256)
def _prepared(
    problem: Problem,
    dtype: torch.dtype,
    device: int,
    q: Place,
    k: Place,
    v: Place | None,
    q_sizes: Sizes | None,
    kv_sizes: Sizes | None,
) -> _Prepared:
    """The launch for tensors at these addresses, with these strides."""
    params = Params()
    tile = tile_of(problem.queries)
    box = box_of(tile)
    q_side, kv_side = (problem.queries, q_sizes), (problem.keys, kv_sizes)
    for i, (place, (side, sizes)) in enumerate(((q, q_side), (k, kv_side), (v, kv_side))):
        if place is not None:
            _set_operand(params, i, problem, side, dtype, device, place, sizes, tile, box)
    frames, height, _ = video_of(problem.queries)
    params.frames, params.height, params.tiles_h = frames, height, -(-height // tile[1])
    params.tile[:], params.box[:] = tile, box
    _, head_axis, token_axis, _ = axes(problem.queries.layout)
    _, strides = q
    params.heads_first = strides[head_axis] < strides[token_axis]
    blocks = sum(operand.num_items for operand in params.operands)
    return _Prepared(params, blocks, module.launcher(block_means_kernel(dtype, problem.head_dim), device))


def _set_operand(
    params: Params,
    i: int,
    problem: Problem,
    side: Side,
    dtype: torch.dtype,
    device: int,
    place: Place,
    sizes: Sizes | None,
    tile: tuple[int, int, int],
    box: tuple[int, int, int],
) -> None:
    video = video_of(side)
    operand = params.operands[i]
    params.maps[i], operand.steps = map_of(problem, side, dtype, device, place, video, box, problem.head_dim)
    if sizes is not None:
        operand.sizes, operand.sizes_are_64_bit = sizes
    operand.num_blocks = side.num_blocks
    operand.num_items = problem.batch * side.heads * operand.num_blocks
    operand.heads = side.heads
    operand.width = video[2]
    operand.tiles_w = -(-video[2] // tile[2])
