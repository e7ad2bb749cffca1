"""The forward of the fine branch: parameters, specialisation and launch of ``vsa/attend_forward.cu``."""

from __future__ import annotations

import ctypes
import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from vsa_jit.backends.sm90.means import DTYPES, LABELS
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
from vsa_jit.jit.driver import SWIZZLE_128B, Launcher, TensorMap
from vsa_jit.jit.kernel import Kernel
from vsa_jit.problem import Operands, Problem, Side, axes, empty_like

LOG2E = math.log2(math.e)
# Of a thread block on sm_90, from the CUDA programming guide's table of compute capabilities.
MOST_SHARED_MEMORY = 227 * 1024
WARPGROUP_THREADS = 128
# What TMA writes with a swizzle of 128 bytes: channels at a time, and the alignment of a tile.
PANEL_CHANNELS = 64
TILE_ALIGNMENT = 1024
# Barriers and what is told; the structure's size is a multiple of its alignment.
SMEM_BESIDE_TILES = 3 * TILE_ALIGNMENT
# So that 32 bits count whatever there is of a sequence.
MOST_BLOCKS = 1 << 20

# Boxes of queries that a thread block attends together, each by a warpgroup, and the most rows that they are of.
CONSUMERS = TRIO_ROWS = 3
# Items of work that a thread block knows of at a time.
ITEMS = 2
# Trios that a warp puts in order at a time.
WINDOW_TRIOS = 10
# Of an entry of a list, and of the counter of work, which lies behind the lists.
TILE_BYTES, COUNTER_BYTES = 16, 4


class _Video(ctypes.Structure):
    _fields_ = (("t", ctypes.c_int), ("h", ctypes.c_int), ("w", ctypes.c_int))


class _Divisor(ctypes.Structure):
    _fields_ = (("value", ctypes.c_int), ("inverse", ctypes.c_uint32), ("shift", ctypes.c_int))


class _Order(ctypes.Structure):
    _fields_ = (
        ("tiles_w", _Divisor),
        ("tiles_h", _Divisor),
        ("boxes_w", _Divisor),
        ("boxes_h", _Divisor),
        ("extent", _Video),
        ("tile", _Video),
        ("box", _Video),
        ("box_w_log2", ctypes.c_int),
        ("box_hw_log2", ctypes.c_int),
        ("boxes", _Divisor),
        ("partial", ctypes.c_int),
        ("sizes_are_64_bit", ctypes.c_int),
        ("sizes", ctypes.c_void_p),
    )


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("map", TensorMap),
        ("steps", HeadSteps),
        ("padding", ctypes.c_uint8 * 48),
    )


class _Map(ctypes.Structure):
    _fields_ = (
        ("q2k_idx", ctypes.c_void_p),
        ("q2k_num", ctypes.c_void_p),
        ("width", ctypes.c_int),
        ("num_q_blocks", ctypes.c_int),
        ("num_kv_blocks", ctypes.c_int),
    )


class _Cut(ctypes.Structure):
    _fields_ = (
        ("groups", _Divisor),
        ("trio_rows", ctypes.c_int),
        ("longer_trios", ctypes.c_int),
        ("windows", _Divisor),
        ("window_trios", ctypes.c_int),
        ("longer_windows", ctypes.c_int),
    )


class Params(ctypes.Structure):
    """``Params`` of ``attend_forward.cu``, whose comments say what each is."""

    _fields_ = (
        ("q", _Tensor),
        ("k", _Tensor),
        ("v", _Tensor),
        ("out", ctypes.c_void_p),
        ("out_s", ctypes.c_void_p),
        ("out_strides", ctypes.c_int64 * 3),
        ("queries", _Order),
        ("keys", _Order),
        ("selected", _Map),
        ("cuts", _Cut * 2),
        ("first_heads", ctypes.c_int),
        ("first_groups", ctypes.c_int),
        ("lists", ctypes.c_void_p),
        ("list_length", ctypes.c_int64),
        ("next", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("out_c", ctypes.c_void_p),
        ("gate", ctypes.c_void_p),
        ("gate_strides", ctypes.c_int64 * 4),
        ("gate_value", ctypes.c_float),
        ("gate_is_fp32", ctypes.c_int),
        ("num_groups", ctypes.c_int),
        ("heads", _Divisor),
        ("kv_group", _Divisor),
        ("q_len", ctypes.c_int),
        ("scale_log2", ctypes.c_float),
        ("padding", ctypes.c_uint8 * 48),
    )


@functools.cache
def forward_kernel(dtype: torch.dtype, head_dim: int) -> Kernel:
    box_bytes = BOX_TOKENS * head_dim * dtype.itemsize
    stages = (MOST_SHARED_MEMORY - SMEM_BESIDE_TILES) // box_bytes - CONSUMERS
    # A tile of V waits for the probabilities of its keys: it is held for longer than the K.
    k_stages = stages // 2 - 1
    return Kernel(
        source="vsa/attend_forward.cu",
        entry="attend_forward",
        label=f"forward {LABELS[dtype]} D={head_dim}",
        defines=(
            ("VSA_DTYPE", DTYPES[dtype]),
            ("VSA_HEAD_DIM", str(head_dim)),
            ("VSA_K_STAGES", str(k_stages)),
            ("VSA_V_STAGES", str(stages - k_stages)),
        ),
        params=Params,
        threads=(CONSUMERS + 1) * WARPGROUP_THREADS,
        smem_bytes=(stages + CONSUMERS) * box_bytes + SMEM_BESIDE_TILES,
    )


def why_not_size(problem: Problem) -> str | None:
    """Why a call has too many blocks. None: it has not."""
    if problem.queries.num_blocks > MOST_BLOCKS:
        return f"the kernels take at most {MOST_BLOCKS} query blocks, and there are {problem.queries.num_blocks}"
    most = MOST_BLOCKS // (problem.block // BOX_TOKENS)
    if problem.keys.num_blocks > most:
        return f"the kernels take at most {most} key blocks, and there are {problem.keys.num_blocks}"
    return None


def forward(problem: Problem, operands: Operands, keep_out_s: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    q, k, v, q2k_idx, q2k_num, q_sizes, kv_sizes, out_c, gate, gate_value = operands
    out = empty_like(q)
    out_s = empty_like(q) if keep_out_s else None
    lse = q.new_empty((problem.batch, problem.queries.heads, problem.queries.length), dtype=torch.float32)
    q2k_idx, q2k_num = q2k_idx.contiguous(), q2k_num.contiguous()
    device = q.get_device()
    # Spelt out, which is quicker than a map: every call passes here.
    prepared = _prepared(
        problem,
        q.dtype,
        device,
        q2k_idx.shape[-1],
        place_of(q),
        place_of(k),
        place_of(v),
        out.stride(),
        sizes_of(q_sizes),
        sizes_of(kv_sizes),
    )
    lists = q.new_empty(prepared.list_bytes + COUNTER_BYTES, dtype=torch.uint8)
    params = Params.from_buffer_copy(prepared.params)
    params.lists = lists.data_ptr()
    params.next = counter = lists.data_ptr() + prepared.list_bytes
    params.selected.q2k_idx, params.selected.q2k_num = q2k_idx.data_ptr(), q2k_num.data_ptr()
    params.out, params.lse = out.data_ptr(), lse.data_ptr()
    if out_s is not None:
        params.out_s = out_s.data_ptr()
    if out_c is not None:
        out_c = out_c.contiguous()
        params.out_c, params.gate_value = out_c.data_ptr(), gate_value
        if gate is not None:
            gate = gate if gate.dtype in (q.dtype, torch.float32) else gate.float()
            params.gate, params.gate_is_fp32 = gate.data_ptr(), gate.dtype == torch.float32
            params.gate_strides[:] = [gate.stride(axis) for axis in axes(problem.queries.layout)]
    prepared.launch(prepared.blocks, params, counter)
    return out, lse, out_s


class _Prepared(NamedTuple):
    """All of a launch but where the map, the lists, the outputs and the coarse output are."""

    params: Params
    list_bytes: int
    blocks: int
    launch: Launcher


@functools.lru_cache(maxsize=256)
def _prepared(
    problem: Problem,
    dtype: torch.dtype,
    device: int,
    width: int,
    q: Place,
    k: Place,
    v: Place,
    out_strides: tuple[int, ...],
    q_sizes: Sizes | None,
    kv_sizes: Sizes | None,
) -> _Prepared:
    """The launches for tensors at these addresses, with these strides."""
    boxes = problem.block // BOX_TOKENS
    heads = problem.batch * problem.queries.heads
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    padded = kv_sizes is not None
    first_heads, trio_rows = _trios(problem.queries.num_blocks, boxes, heads, processors)
    cuts = [_cut(problem.queries.num_blocks, rows, boxes) for rows in (trio_rows, max(1, trio_rows - 1))]
    first_groups = first_heads * cuts[0].groups.value
    num_groups = first_groups + (heads - first_heads) * cuts[1].groups.value
    blocks = min(processors, num_groups)
    # Boxes that follow each other are of at most two blocks where these have several.
    rows_of_group = TRIO_ROWS if boxes == 1 else 2
    list_length = min(rows_of_group * width, problem.keys.num_blocks) * boxes
    params = Params(
        queries=_order(problem.queries, q_sizes, padded=False),
        keys=_order(problem.keys, kv_sizes, padded=padded),
        selected=_Map(width=width, num_q_blocks=problem.queries.num_blocks, num_kv_blocks=problem.keys.num_blocks),
        cuts=(_Cut * 2)(*cuts),
        first_heads=first_heads,
        first_groups=first_groups,
        list_length=list_length,
        num_groups=num_groups,
        heads=_divisor(problem.queries.heads),
        kv_group=_divisor(problem.group),
        q_len=problem.queries.length,
        scale_log2=problem.softmax_scale * LOG2E,
    )
    params.out_strides[:] = [out_strides[axis] for axis in axes(problem.queries.layout)[:3]]
    params.q = _tensor(problem, problem.queries, dtype, device, q, padded=False)
    for name, place in (("k", k), ("v", v)):
        setattr(params, name, _tensor(problem, problem.keys, dtype, device, place, padded=padded))
    launch = module.launcher(forward_kernel(dtype, problem.head_dim), device)
    return _Prepared(params, blocks * ITEMS * list_length * TILE_BYTES, blocks, launch)


def _cut(num_rows: int, trio_rows: int, boxes: int) -> _Cut:
    """How the rows of a head are cut, so many at most into a trio."""
    trios = -(-num_rows // trio_rows)
    windows = -(-trios // WINDOW_TRIOS)
    # Rows of several boxes go by threes, so that consumers without work are in the last trio of a head only.
    rows = divmod(num_rows, trios) if boxes == 1 else (trio_rows, 0)
    return _Cut(_divisor(trios * boxes), *rows, _divisor(windows), *divmod(trios, windows))


def _trios(num_rows: int, boxes: int, heads: int, processors: int) -> tuple[int, int]:
    """How many heads are cut into long trios, and how many rows these have; those of the others have one less.

    Multiprocessors take a group each, round after round. Trios are as short as they can be while the rounds are as few
    as those of the longest: a short group takes less time.
    """
    if boxes > 1:
        return heads, TRIO_ROWS
    most = -(-heads * -(-num_rows // TRIO_ROWS) // processors) * processors
    rows = next(rows for rows in range(1, TRIO_ROWS + 1) if heads * -(-num_rows // rows) <= most)
    if rows == 1:
        return heads, rows
    long, short = -(-num_rows // rows), -(-num_rows // (rows - 1))
    return next(first for first in range(heads + 1) if first * long + (heads - first) * short <= most), rows


def _view(side: Side, padded: bool) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """A sequence as a video, and its block as a tile.

    Of padded blocks every row is a box: one that starts before its row gets zeros from there.
    """
    if padded:
        return (1, side.length // BOX_TOKENS, BOX_TOKENS), (1, side.block // BOX_TOKENS, BOX_TOKENS)
    return video_of(side), tile_of(side)


def _divisor(value: int) -> _Divisor:
    shift = (value - 1).bit_length()
    return _Divisor(value, -(-(1 << 31 + shift) // value), shift)


def _order(side: Side, sizes: Sizes | None, *, padded: bool) -> _Order:
    video, tile = _view(side, padded)
    box = box_of(tile)
    order = _Order(
        extent=_Video(*video),
        tile=_Video(*tile),
        box=_Video(*box),
        box_w_log2=box[2].bit_length() - 1,
        box_hw_log2=(box[1] * box[2]).bit_length() - 1,
        boxes=_divisor(side.block // BOX_TOKENS),
        partial=sizes is not None or side.is_partial,
    )
    order.tiles_h, order.tiles_w = (_divisor(-(-video[axis] // tile[axis])) for axis in (1, 2))
    order.boxes_h, order.boxes_w = (_divisor(tile[axis] // box[axis]) for axis in (1, 2))
    if sizes is not None:
        order.sizes, order.sizes_are_64_bit = sizes
    return order


def _tensor(problem: Problem, side: Side, dtype: torch.dtype, device: int, place: Place, *, padded: bool) -> _Tensor:
    video, tile = _view(side, padded)
    return _Tensor(*map_of(problem, side, dtype, device, place, video, box_of(tile), PANEL_CHANNELS, SWIZZLE_128B))
