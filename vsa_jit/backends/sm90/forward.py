"""The forward of the fine branch: parameters, specialisation and launch of its two kernels.

``vsa/plan_forward.cu`` decides what is attended together and in which order, and ``vsa/attend_forward.cu`` attends it.
"""

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
from vsa_jit.problem import Operands, Problem, axes, empty_like

LOG2E = math.log2(math.e)
# Of a thread block on sm_90, from the CUDA programming guide's table of compute capabilities.
MOST_SHARED_MEMORY = 227 * 1024
WARPGROUP_THREADS = 128
# What TMA writes with a swizzle of 128 bytes: channels at a time, and the alignment of a tile.
PANEL_CHANNELS = 64
TILE_ALIGNMENT = 1024
# Barriers and what is told; the structure's size is a multiple of its alignment.
SMEM_BESIDE_TILES = 2 * TILE_ALIGNMENT
DIVISOR_SHIFT = 40
# Quotients are exact below 2^40 over the divisor, which is at most the number of blocks.
MOST_QUERY_BLOCKS = 1 << DIVISOR_SHIFT // 2

# Boxes of queries that a thread block attends together, each by a warpgroup.
CONSUMERS = 3
PLAN_THREADS = 256
# Boxes of queries in a chunk: many find better groups, few keep more multiprocessors busy.
MOST_PLAN_BOXES, FEWEST_PLAN_BOXES = 24, 8
PLAN_MAP_WORDS = 9 * 1024
PLAN_SMEM_BYTES = 4 * PLAN_MAP_WORDS + 18 * 1024
# Where the plan's counter ends, and the size of its records.
COUNTER_BYTES = 16
GROUP_BYTES = 44
TILE_BYTES = 16


class _Video(ctypes.Structure):
    _fields_ = (("t", ctypes.c_int), ("h", ctypes.c_int), ("w", ctypes.c_int))


class _Divisor(ctypes.Structure):
    _fields_ = (("inverse", ctypes.c_int64), ("value", ctypes.c_int))


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
        ("boxes", ctypes.c_int),
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


class PlanParams(ctypes.Structure):
    """``Params`` of ``plan_forward.cu``, whose comments say what each is."""

    _fields_ = (
        ("keys", _Order),
        ("q2k_idx", ctypes.c_void_p),
        ("q2k_num", ctypes.c_void_p),
        ("groups", ctypes.c_void_p),
        ("tiles", ctypes.c_void_p),
        ("next", ctypes.c_void_p),
        ("tiles_per_group", ctypes.c_int64),
        ("width", ctypes.c_int),
        ("num_q_blocks", ctypes.c_int),
        ("num_kv_blocks", ctypes.c_int),
        ("rows_per_chunk", ctypes.c_int),
        ("chunks_per_head", ctypes.c_int),
        ("groups_per_chunk", ctypes.c_int),
    )


class Params(ctypes.Structure):
    """``Params`` of ``attend_forward.cu``, whose comments say what each is."""

    _fields_ = (
        ("q", _Tensor),
        ("k", _Tensor),
        ("v", _Tensor),
        ("out", _Tensor),
        ("out_s", _Tensor),
        ("queries", _Order),
        ("keys", _Order),
        ("groups", ctypes.c_void_p),
        ("tiles", ctypes.c_void_p),
        ("tiles_per_group", ctypes.c_int64),
        ("next", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("out_c", ctypes.c_void_p),
        ("gate", ctypes.c_void_p),
        ("gate_strides", ctypes.c_int64 * 4),
        ("gate_value", ctypes.c_float),
        ("gate_is_fp32", ctypes.c_int),
        ("keep_out_s", ctypes.c_int),
        ("num_groups", ctypes.c_int),
        ("groups_per_head", ctypes.c_int),
        ("heads", ctypes.c_int),
        ("kv_group", ctypes.c_int),
        ("num_q_blocks", ctypes.c_int),
        ("q_len", ctypes.c_int),
        ("scale_log2", ctypes.c_float),
    )


def forward_kernels(dtype: torch.dtype, head_dim: int) -> list[Kernel]:
    return [_plan_kernel(), _attend_kernel(dtype, head_dim)]


@functools.cache
def _plan_kernel() -> Kernel:
    return Kernel(
        source="vsa/plan_forward.cu",
        entry="plan_forward",
        label="forward plan",
        defines=(("VSA_MAP_WORDS", str(PLAN_MAP_WORDS)),),
        params=PlanParams,
        threads=PLAN_THREADS,
        smem_bytes=PLAN_SMEM_BYTES,
    )


@functools.cache
def _attend_kernel(dtype: torch.dtype, head_dim: int) -> Kernel:
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


def why_not_plan(problem: Problem) -> str | None:
    """Why the map of a call cannot be planned. None: it can."""
    if problem.num_q_blocks > MOST_QUERY_BLOCKS:
        return f"the kernels plan at most {MOST_QUERY_BLOCKS} query blocks, and there are {problem.num_q_blocks}"
    if _most_rows(problem) >= CONSUMERS:
        return None
    words = PLAN_MAP_WORDS // (CONSUMERS + 1)
    most = 32 * (words - 1 + words % 2) // (problem.block // BOX_TOKENS)
    return f"the kernels plan at most {most} key blocks, and there are {problem.num_kv_blocks}"


def _most_rows(problem: Problem) -> int:
    """Rows whose bits fit into a chunk: of an odd number of words each, and with one more row."""
    boxes = problem.num_kv_blocks * (problem.block // BOX_TOKENS)
    return PLAN_MAP_WORDS // (-(-boxes // 32) | 1) - 1


def forward(problem: Problem, operands: Operands, keep_out_s: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    q, k, v, q2k_idx, q2k_num, q_sizes, kv_sizes, out_c, gate, gate_value = operands
    out = empty_like(q)
    out_s = empty_like(q) if keep_out_s else None
    lse = q.new_empty((problem.batch, problem.heads, problem.q_len), dtype=torch.float32)
    q2k_idx, q2k_num = q2k_idx.contiguous(), q2k_num.contiguous()
    # Spelt out, which is quicker than a map: every call passes here.
    prepared = _prepared(
        problem,
        q.dtype,
        q.get_device(),
        q2k_idx.shape[-1],
        place_of(q),
        place_of(k),
        place_of(v),
        place_of(out),
        place_of(out_s),
        sizes_of(q_sizes),
        sizes_of(kv_sizes),
    )
    plan = q.new_empty(prepared.plan_bytes, dtype=torch.uint8)
    counter = plan.data_ptr()
    groups = counter + COUNTER_BYTES
    tiles = groups + prepared.group_bytes

    plan_params = PlanParams.from_buffer_copy(prepared.plan_params)
    plan_params.q2k_idx, plan_params.q2k_num = q2k_idx.data_ptr(), q2k_num.data_ptr()
    plan_params.next, plan_params.groups, plan_params.tiles = counter, groups, tiles
    prepared.launch_plan(prepared.chunks, plan_params)

    params = Params.from_buffer_copy(prepared.params)
    params.next, params.groups, params.tiles = counter, groups, tiles
    params.lse = lse.data_ptr()
    if out_c is not None:
        out_c = out_c.contiguous()
        params.out_c, params.gate_value = out_c.data_ptr(), gate_value
        if gate is not None:
            gate = gate if gate.dtype in (q.dtype, torch.float32) else gate.float()
            params.gate, params.gate_is_fp32 = gate.data_ptr(), gate.dtype == torch.float32
            params.gate_strides[:] = [gate.stride(axis) for axis in axes(problem.layout)]
    prepared.launch(prepared.blocks, params)
    return out, lse, out_s


class _Prepared(NamedTuple):
    """All of the two launches but where the map, the plan, the statistics and the coarse output are."""

    plan_params: PlanParams
    params: Params
    plan_bytes: int
    group_bytes: int
    chunks: int
    blocks: int
    launch_plan: Launcher
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
    out: Place,
    out_s: Place | None,
    q_sizes: Sizes | None,
    kv_sizes: Sizes | None,
) -> _Prepared:
    """The launches for tensors at these addresses, with these strides."""
    boxes = problem.block // BOX_TOKENS
    heads = problem.batch * problem.heads
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    fair = heads * problem.num_q_blocks * boxes // processors
    plan_boxes = max(FEWEST_PLAN_BOXES, min(fair, MOST_PLAN_BOXES))
    most_rows = max(CONSUMERS, min(plan_boxes // boxes, _most_rows(problem)))
    if boxes == 1:
        chunks, rows, groups_per_chunk = _chunks_of_boxes(problem.num_q_blocks, heads, most_rows, processors)
    else:
        # Rows by threes: consumers without work are in the last chunk of a head only.
        chunks = -(-problem.num_q_blocks // (most_rows // CONSUMERS * CONSUMERS))
        rows = -(-problem.num_q_blocks // (chunks * CONSUMERS)) * CONSUMERS
        groups_per_chunk = rows * boxes // CONSUMERS
    groups_per_head = chunks * groups_per_chunk
    num_groups = groups_per_head * heads
    # Boxes that follow each other are of at most two blocks where these have several.
    rows_of_group = -(-rows // groups_per_chunk) if boxes == 1 else 2
    tiles_per_group = min(rows_of_group * width, problem.num_kv_blocks) * boxes
    group_bytes = -(-num_groups * GROUP_BYTES // TILE_BYTES) * TILE_BYTES

    padded = kv_sizes is not None
    keys = _order(problem, problem.kv_len, kv_sizes, padded=padded)
    plan_params = PlanParams(
        keys=keys,
        tiles_per_group=tiles_per_group,
        width=width,
        num_q_blocks=problem.num_q_blocks,
        num_kv_blocks=problem.num_kv_blocks,
        rows_per_chunk=rows,
        chunks_per_head=chunks,
        groups_per_chunk=groups_per_chunk,
    )
    params = Params(
        queries=_order(problem, problem.q_len, q_sizes, padded=False),
        keys=keys,
        tiles_per_group=tiles_per_group,
        keep_out_s=out_s is not None,
        num_groups=num_groups,
        groups_per_head=groups_per_head,
        heads=problem.heads,
        kv_group=problem.group,
        num_q_blocks=problem.num_q_blocks,
        q_len=problem.q_len,
        scale_log2=problem.softmax_scale * LOG2E,
    )
    for name, place in (("q", q), ("out", out), ("out_s", out_s)):
        if place is not None:
            setattr(params, name, _tensor(problem, dtype, device, place, problem.heads, problem.q_len, padded=False))
    for name, place in (("k", k), ("v", v)):
        setattr(params, name, _tensor(problem, dtype, device, place, problem.kv_heads, problem.kv_len, padded=padded))
    plan_kernel, attend_kernel = forward_kernels(dtype, problem.head_dim)
    return _Prepared(
        plan_params,
        params,
        COUNTER_BYTES + group_bytes + num_groups * tiles_per_group * TILE_BYTES,
        group_bytes,
        heads * chunks,
        min(processors, num_groups),
        module.launcher(plan_kernel, device),
        module.launcher(attend_kernel, device),
    )


def _chunks_of_boxes(num_rows: int, heads: int, most_rows: int, processors: int) -> tuple[int, int, int]:
    """How the rows of a head, of one box each, are cut: chunks, rows of a chunk, and groups of a full one.

    Multiprocessors take a group each, round after round. Of what takes the fewest rounds, the chunks are long, since in
    these better groups are found, and the groups many, since small ones take less time.
    """
    rounds = -(-heads * num_rows // (CONSUMERS * processors))
    cuts = []
    for wanted in range(most_rows, min(most_rows, 2 * CONSUMERS) - 1, -1):
        chunks = -(-num_rows // wanted)
        rows = -(-num_rows // chunks)
        groups = max(-(-rows // CONSUMERS), min(rows * rounds * processors // (heads * num_rows), rows))
        of_last = -(-(num_rows - (chunks - 1) * rows) * groups // rows)
        all_groups = heads * ((chunks - 1) * groups + of_last)
        cuts.append((-(-all_groups // processors), chunks, rows, groups))
    _, *cut = min(cuts, key=lambda cut: cut[0])
    return cut[0], cut[1], cut[2]


def _view(problem: Problem, length: int, padded: bool) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """A sequence as a video, and its block as a tile.

    Of padded blocks every row is a box: one that starts before its row gets zeros from there.
    """
    if padded:
        return (1, length // BOX_TOKENS, BOX_TOKENS), (1, problem.block // BOX_TOKENS, BOX_TOKENS)
    return video_of(problem, length), tile_of(problem)


def _divisor(value: int) -> _Divisor:
    return _Divisor(-(-(1 << DIVISOR_SHIFT) // value), value)


def _order(problem: Problem, length: int, sizes: Sizes | None, *, padded: bool) -> _Order:
    video, tile = _view(problem, length, padded)
    box = box_of(tile)
    order = _Order(
        extent=_Video(*video),
        tile=_Video(*tile),
        box=_Video(*box),
        box_w_log2=box[2].bit_length() - 1,
        box_hw_log2=(box[1] * box[2]).bit_length() - 1,
        boxes=problem.block // BOX_TOKENS,
        partial=sizes is not None or problem.is_partial(length),
    )
    order.tiles_h, order.tiles_w = (_divisor(-(-video[axis] // tile[axis])) for axis in (1, 2))
    order.boxes_h, order.boxes_w = (_divisor(tile[axis] // box[axis]) for axis in (1, 2))
    if sizes is not None:
        order.sizes, order.sizes_are_64_bit = sizes
    return order


def _tensor(
    problem: Problem, dtype: torch.dtype, device: int, place: Place, heads: int, length: int, *, padded: bool
) -> _Tensor:
    video, tile = _view(problem, length, padded)
    return _Tensor(*map_of(problem, dtype, device, place, heads, video, box_of(tile), PANEL_CHANNELS, SWIZZLE_128B))
