"""Which kernels a call runs, and what each is compiled for."""

from __future__ import annotations

import ctypes
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
# On sm_90, from the CUDA programming guide's table of compute capabilities: of a multiprocessor, what the system takes
# for each thread block, and the most that a thread block can have.
PROCESSOR_SHARED_MEMORY = 228 * 1024
RESERVED_SHARED_MEMORY = 1024
MAX_SHARED_MEMORY = PROCESSOR_SHARED_MEMORY - RESERVED_SHARED_MEMORY
# Of the forward beside its tiles: barriers, queues, and what the scheduler needs. A multiple of the tiles' alignment.
FORWARD_SMEM_BESIDE_TILES = 3 * 1024
# Consumers of the pass for dq, by head dim: what registers allow.
Q_CONSUMERS = {64: 3, 128: 2}
# Of the passes over queries beside their tiles.
SMEM_BESIDE_QUERIES = 3 * 1024
# Thread blocks of a multiprocessor in the pass for dk and dv, by head dim.
KV_THREAD_BLOCKS = {64: 2, 128: 1}
# So many stages the queue of tickets can tell apart.
MAX_QUEUED_STAGES = 14
# The backward of blocks of as many tokens may take one pass.
ONE_PASS_BLOCK = 128
# Key blocks whose inverse a thread block makes at a time.
INVERSE_SLICE = 8192
FLOAT_BYTES = 4

# Of the coarse branch: threads; stages, each with 32 channels of the means whose scores are computed, in rows that are
# padded by 8; and shared memory beside them.
COARSE_THREADS = 512
COARSE_STAGES = 4
COARSE_STAGE_BYTES = (structs.COARSE_TILE_ROWS + structs.COARSE_SCORE_COLS) * (32 + 8) * FLOAT_BYTES
COARSE_SMEM = COARSE_STAGES * COARSE_STAGE_BYTES + 5 * 1024

# Of the block means: warps that sum, and shared memory beside the boxes: barriers, and what is said of the boxes. The
# coarse attention starts while those of v are summed: a multiprocessor has shared memory for a thread block of both,
# and each of its four parts has registers, 16,384, for four warps of the one and two of the other.
MEANS_CONSUMERS = 6
MEANS_SMEM_BESIDE_BOXES = 1024
MAX_MEANS_SMEM = PROCESSOR_SHARED_MEMORY - COARSE_SMEM - 2 * RESERVED_SHARED_MEMORY
MEANS_REGISTERS, COARSE_REGISTERS = 32, 112


def kernels_of(dtype: torch.dtype, head_dim: int, block: int | None = None, segments: bool = False) -> list[Kernel]:
    """All kernels that calls with such blocks may launch, or with blocks of any size. They are made ready together.

    Args:
        segments: of calls whose tokens are segments.
    """
    of_kind = [block_means, attend_forward, prepare_backward, attend_backward_q, attend_backward_kv]
    if block is None or block >= ONE_PASS_BLOCK:
        of_kind += [attend_backward_qkv, store_dq]
    found = [*(kernel(dtype, head_dim, segments) for kernel in of_kind), order_rows()]
    found += [kernel(head_dim) for kernel in (coarse_attend, coarse_backward_q, coarse_backward_kv)]
    return [*found, segment_maps()] if segments else found


def _label(name: str, dtype: torch.dtype, head_dim: int, segments: bool) -> str:
    return f"{name} {LABELS[dtype]} D={head_dim}{', segments' if segments else ''}"


def _defines(dtype: torch.dtype, head_dim: int, segments: bool, **others: int) -> tuple[tuple[str, str], ...]:
    numbers = {"VSA_HEAD_DIM": head_dim, "VSA_BOX_TOKENS": structs.BOX_TOKENS, **others}
    if segments:
        numbers |= {"VSA_SEGMENTS": 1, "VSA_BOX_RECORD_BYTES": ctypes.sizeof(structs.BoxRecord)}
    return ("VSA_DTYPE", DTYPES[dtype]), *((name, str(number)) for name, number in numbers.items())


def _box_bytes(dtype: torch.dtype, columns: int) -> int:
    """Of a tile with a row for each token of a box: its channels, or its probabilities for those of another."""
    return structs.BOX_TOKENS * columns * dtype.itemsize


@functools.cache
def block_means(dtype: torch.dtype, head_dim: int, segments: bool = False) -> Kernel:
    box_bytes = _box_bytes(dtype, head_dim)
    stages = (MAX_MEANS_SMEM - MEANS_SMEM_BESIDE_BOXES) // box_bytes // MEANS_CONSUMERS * MEANS_CONSUMERS
    return Kernel(
        source="vsa/block_means.cu",
        entry="block_means",
        label=_label("block means", dtype, head_dim, segments),
        defines=_defines(
            dtype,
            head_dim,
            segments,
            VSA_CONSUMERS=MEANS_CONSUMERS,
            VSA_STAGES=stages,
            VSA_REGISTERS=MEANS_REGISTERS,
        ),
        params=structs.structures(segments).BlockMeansParams,
        threads=(MEANS_CONSUMERS + 1) * WARP_THREADS,
        smem_bytes=stages * box_bytes + MEANS_SMEM_BESIDE_BOXES,
    )


@functools.cache
def attend_forward(dtype: torch.dtype, head_dim: int, segments: bool = False) -> Kernel:
    box_bytes = _box_bytes(dtype, head_dim)
    stages = (MAX_SHARED_MEMORY - FORWARD_SMEM_BESIDE_TILES) // box_bytes - structs.CONSUMERS
    # A tile of V waits for the probabilities of its keys: it is held for longer than the K.
    k_stages = stages // 2 - 1
    return Kernel(
        source="vsa/attend_forward.cu",
        entry="attend_forward",
        label=_label("forward", dtype, head_dim, segments),
        defines=_defines(
            dtype,
            head_dim,
            segments,
            VSA_CONSUMERS=structs.CONSUMERS,
            VSA_WORK_TILES=structs.WORK_TILES,
            VSA_KEY_TILE_BYTES=structs.KEY_TILE_BYTES,
            VSA_K_STAGES=k_stages,
            VSA_V_STAGES=stages - k_stages,
        ),
        params=structs.structures(segments).AttendForwardParams,
        threads=(structs.CONSUMERS + 1) * WARPGROUP_THREADS,
        smem_bytes=(stages + structs.CONSUMERS) * box_bytes + FORWARD_SMEM_BESIDE_TILES,
        starts_early=True,
    )


@functools.cache
def prepare_backward(dtype: torch.dtype, head_dim: int, segments: bool = False) -> Kernel:
    return Kernel(
        source="vsa/prepare_backward.cu",
        entry="prepare_backward",
        label=_label("backward's preparation", dtype, head_dim, segments),
        defines=_defines(
            dtype, head_dim, segments, VSA_KEY_TILE_BYTES=structs.KEY_TILE_BYTES, VSA_INVERSE_SLICE=INVERSE_SLICE
        ),
        params=structs.structures(segments).PrepareBackwardParams,
        threads=WARPGROUP_THREADS,
        # More than the sums of the coarse gradient take.
        smem_bytes=INVERSE_SLICE * FLOAT_BYTES,
    )


@functools.cache
def order_rows() -> Kernel:
    return Kernel(
        source="vsa/order_rows.cu",
        entry="order_rows",
        label="order of an inverse's rows",
        defines=(),
        params=structs.OrderRowsParams,
        threads=1024,
        smem_bytes=2 * 256 * FLOAT_BYTES,
    )


@functools.cache
def attend_backward_q(dtype: torch.dtype, head_dim: int, segments: bool = False) -> Kernel:
    consumers = Q_CONSUMERS[head_dim]
    # Q and dO of every consumer, and K and V in each stage.
    boxes = (MAX_SHARED_MEMORY - FORWARD_SMEM_BESIDE_TILES) // _box_bytes(dtype, head_dim)
    stages = min(boxes // 2 - consumers, MAX_QUEUED_STAGES)
    return Kernel(
        source="vsa/attend_backward_q.cu",
        entry="attend_backward_q",
        label=_label("backward of q", dtype, head_dim, segments),
        defines=_defines(
            dtype,
            head_dim,
            segments,
            VSA_CONSUMERS=consumers,
            VSA_WORK_TILES=structs.WORK_TILES,
            VSA_KEY_TILE_BYTES=structs.KEY_TILE_BYTES,
            VSA_STAGES=stages,
        ),
        params=structs.structures(segments).AttendBackwardQParams,
        threads=(consumers + 1) * WARPGROUP_THREADS,
        smem_bytes=2 * (stages + consumers) * _box_bytes(dtype, head_dim) + FORWARD_SMEM_BESIDE_TILES,
    )


@functools.cache
def attend_backward_kv(dtype: torch.dtype, head_dim: int, segments: bool = False) -> Kernel:
    entry, warpgroups, beside_stages = "attend_backward_kv_64", 2, 2 * _box_bytes(dtype, head_dim)
    if head_dim > 64:
        # Pᵀ of two tiles is on its way between warpgroups.
        entry, warpgroups = "attend_backward_kv", 3
        beside_stages += 2 * _box_bytes(dtype, structs.BOX_TOKENS)
    return _pass_over_queries(
        entry,
        "backward of k and v",
        dtype,
        head_dim,
        segments,
        warpgroups=warpgroups,
        beside_stages=beside_stages,
        blocks=KV_THREAD_BLOCKS[head_dim],
    )


@functools.cache
def attend_backward_qkv(dtype: torch.dtype, head_dim: int, segments: bool = False) -> Kernel:
    # K and V of two boxes, and two buffers for dSᵀ of each.
    beside_stages = 4 * _box_bytes(dtype, head_dim) + 4 * _box_bytes(dtype, structs.BOX_TOKENS)
    return _pass_over_queries(
        "attend_backward_qkv",
        "backward in one pass",
        dtype,
        head_dim,
        segments,
        warpgroups=4,
        beside_stages=beside_stages,
    )


def _pass_over_queries(
    entry: str,
    label: str,
    dtype: torch.dtype,
    head_dim: int,
    segments: bool,
    *,
    warpgroups: int,
    beside_stages: int,
    blocks: int = 1,
) -> Kernel:
    """A kernel that keeps key boxes in place, with as many stages as fit beside so many bytes of copies.

    Args:
        blocks: thread blocks that share a multiprocessor.
    """
    # Q and dO, with two numbers in fp32 for each query.
    stage_bytes = 2 * (_box_bytes(dtype, head_dim) + structs.BOX_TOKENS * FLOAT_BYTES)
    beside_stages += SMEM_BESIDE_QUERIES
    stages = (PROCESSOR_SHARED_MEMORY // blocks - RESERVED_SHARED_MEMORY - beside_stages) // stage_bytes
    stages = min(stages, MAX_QUEUED_STAGES)
    return Kernel(
        source=f"vsa/{entry}.cu",
        entry=entry,
        label=_label(label, dtype, head_dim, segments),
        defines=_defines(
            dtype,
            head_dim,
            segments,
            VSA_WORK_TILES=structs.WORK_TILES,
            VSA_KEY_TILE_BYTES=structs.KEY_TILE_BYTES,
            VSA_STAGES=stages,
        ),
        params=structs.structures(segments).PassOverQueriesParams,
        threads=warpgroups * WARPGROUP_THREADS,
        smem_bytes=stages * stage_bytes + beside_stages,
    )


@functools.cache
def store_dq(dtype: torch.dtype, head_dim: int, segments: bool = False) -> Kernel:
    return Kernel(
        source="vsa/store_dq.cu",
        entry="store_dq",
        label=_label("store of dq", dtype, head_dim, segments),
        defines=_defines(dtype, head_dim, segments, VSA_KEY_TILE_BYTES=structs.KEY_TILE_BYTES),
        params=structs.structures(segments).StoreDqParams,
        threads=WARPGROUP_THREADS,
        smem_bytes=0,
    )


@functools.cache
def coarse_attend(head_dim: int) -> Kernel:
    name, params = "coarse_attend", structs.CoarseAttendParams
    return _of_coarse(name, "coarse attention", head_dim, params, starts_early=True, VSA_REGISTERS=COARSE_REGISTERS)


@functools.cache
def coarse_backward_q(head_dim: int) -> Kernel:
    return _of_coarse("coarse_backward_q", "coarse backward of q", head_dim, structs.CoarseBackwardQParams)


@functools.cache
def coarse_backward_kv(head_dim: int) -> Kernel:
    return _of_coarse("coarse_backward_kv", "coarse backward of k and v", head_dim, structs.CoarseBackwardKvParams)


def _of_coarse(
    entry: str,
    label: str,
    head_dim: int,
    params: type[ctypes.Structure],
    starts_early: bool = False,
    **others: int,
) -> Kernel:
    """A kernel of the coarse branch, which is computed in fp32 whatever the dtype of q, k and v."""
    numbers = {
        "VSA_HEAD_DIM": head_dim,
        "VSA_TILE_ROWS": structs.COARSE_TILE_ROWS,
        "VSA_SCORE_COLS": structs.COARSE_SCORE_COLS,
        "VSA_MAX_COLS": structs.MAX_COARSE_COLS,
        "VSA_STAGES": COARSE_STAGES,
        **others,
    }
    return Kernel(
        source=f"vsa/{entry}.cu",
        entry=entry,
        label=f"{label} D={head_dim}",
        defines=tuple((name, str(number)) for name, number in numbers.items()),
        params=params,
        threads=COARSE_THREADS,
        smem_bytes=COARSE_SMEM,
        starts_early=starts_early,
    )


@functools.cache
def segment_maps() -> Kernel:
    return Kernel(
        source="vsa/segment_maps.cu",
        entry="segment_maps",
        label="tensor maps of segments",
        defines=(
            ("VSA_TENSORS", str(structs.MAPPED_TENSORS)),
            ("VSA_THREADS", str(WARPGROUP_THREADS)),
            ("VSA_SEGMENT_EXTENT_BYTES", str(ctypes.sizeof(structs.SegmentExtent))),
        ),
        params=structs.SegmentMapsParams,
        threads=WARPGROUP_THREADS,
        smem_bytes=0,
    )
