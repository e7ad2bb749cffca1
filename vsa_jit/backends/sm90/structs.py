"""The structures of the kernels' parameters, as C++ has them, and the constants that both languages need.

Each class is the twin of the C++ structure of its name in ``kernels_src/vsa``, whose comments say what the fields are.
Compilers check the offset of every field against these classes, see ``params.cuh``. ``padding`` is what C++ adds to a
structure that is aligned like the tensor map in it. Some depend on the layout of the tokens, which is that of
``video.cuh`` or that of ``segments.cuh``: see ``structures``.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

from vsa_jit.jit.driver import TensorMap

# Tokens of a box, which TMA loads at a time.
BOX_TOKENS = 64
# Consumer warpgroups of a thread block, each with one query box at a time.
CONSUMERS = 3
# Work tiles that a thread block has at a time: one is attended while the next one's list is written.
WORK_TILES = 2
# Of a key tile in a list.
KEY_TILE_BYTES = 8
# Of the coarse branch: the most query blocks of a row tile, scores of a row computed at a time, of which rows have a
# multiple, and the most of a row.
COARSE_TILE_ROWS = 64
COARSE_SCORE_COLS = 128
MAX_COARSE_COLS = 16384
# Tensors whose maps a launch of segment_maps.cu makes at most: q, k, v and dout.
MAPPED_TENSORS = 4


class Extent3(ctypes.Structure):
    _fields_ = (("t", ctypes.c_int), ("h", ctypes.c_int), ("w", ctypes.c_int))


class Divisor(ctypes.Structure):
    _fields_ = (("value", ctypes.c_int), ("inverse", ctypes.c_uint32), ("shift", ctypes.c_int))


class BoxShape(ctypes.Structure):
    _fields_ = (("extent", Extent3), ("w_log2", ctypes.c_int), ("hw_log2", ctypes.c_int))


class HeadSteps(ctypes.Structure):
    _fields_ = (
        ("head_channel", ctypes.c_int),
        ("batch_channel", ctypes.c_int),
        ("head_outer", ctypes.c_int),
        ("batch_outer", ctypes.c_int),
    )


class IndexBits(ctypes.Structure):
    _fields_ = (
        ("bits", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("num_words", ctypes.c_int),
        ("num_rows", ctypes.c_int),
        ("num_cols", ctypes.c_int),
        ("group", ctypes.c_int),
    )


class TileLists(ctypes.Structure):
    _fields_ = (("tiles", ctypes.c_void_p), ("length", ctypes.c_int64))


class CoarseOutput(ctypes.Structure):
    _fields_ = (
        ("out_c", ctypes.c_void_p),
        ("gate", ctypes.c_void_p),
        ("gate_strides", ctypes.c_int64 * 4),
        ("gate_value", ctypes.c_float),
        ("gate_is_fp32", ctypes.c_int),
    )


class GradientTensor(ctypes.Structure):
    """Of ``backward.cuh``."""

    _fields_ = (("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 3), ("of_means", ctypes.c_void_p))


class OrderRowsParams(ctypes.Structure):
    """``Params`` of ``order_rows.cu``."""

    _fields_ = (("rows", IndexBits), ("order", ctypes.c_void_p), ("classes", ctypes.c_void_p))


class CoarseProblem(ctypes.Structure):
    """Of ``coarse.cuh``."""

    _fields_ = (
        ("tiles", ctypes.c_void_p),
        ("sizes", ctypes.c_void_p),
        ("sizes_are_64_bit", ctypes.c_int),
        ("rounding", ctypes.c_int),
        ("num_rows", ctypes.c_int),
        ("num_cols", ctypes.c_int),
        ("group", ctypes.c_int),
        ("num_tiles", ctypes.c_int),
        ("num_items", ctypes.c_int),
        ("row_floats", ctypes.c_int),
        ("tile_rows", ctypes.c_int),
        ("scale", ctypes.c_float),
    )


class CoarseAttendParams(ctypes.Structure):
    """``Params`` of ``coarse_attend.cu``."""

    _fields_ = (
        ("q", ctypes.c_void_p),
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("idx", ctypes.c_void_p),
        ("num", ctypes.c_void_p),
        ("scores", ctypes.c_void_p),
        ("choices", ctypes.c_void_p),
        ("means_done", ctypes.c_void_p),
        ("problem", CoarseProblem),
        ("width", ctypes.c_int),
        ("means_arrivals", ctypes.c_int),
    )


class CoarseBackwardQParams(ctypes.Structure):
    """``Params`` of ``coarse_backward_q.cu``."""

    _fields_ = (
        ("q", ctypes.c_void_p),
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("dout", ctypes.c_void_p),
        ("dq", ctypes.c_void_p),
        ("p", ctypes.c_void_p),
        ("ds", ctypes.c_void_p),
        ("problem", CoarseProblem),
    )


class CoarseBackwardKvParams(ctypes.Structure):
    """``Params`` of ``coarse_backward_kv.cu``."""

    _fields_ = (
        ("q", ctypes.c_void_p),
        ("dout", ctypes.c_void_p),
        ("p", ctypes.c_void_p),
        ("ds", ctypes.c_void_p),
        ("dk", ctypes.c_void_p),
        ("dv", ctypes.c_void_p),
        ("problem", CoarseProblem),
    )


class SegmentExtent(ctypes.Structure):
    """Of ``segment_maps.cu``."""

    _fields_ = (
        ("first_token", ctypes.c_int),
        ("t", ctypes.c_int),
        ("h", ctypes.c_int),
        ("w", ctypes.c_int),
        ("is_plain", ctypes.c_int),
        ("padding", ctypes.c_uint8 * 12),
    )


class BoxRecord(ctypes.Structure):
    """Of ``segments.cuh``."""

    _fields_ = (
        ("segment", ctypes.c_int),
        ("t", ctypes.c_int),
        ("h", ctypes.c_int),
        ("w", ctypes.c_int),
        ("first_token", ctypes.c_int),
        ("rows_of", ctypes.c_uint32),
        ("valid", ctypes.c_uint32),
        ("first_place", ctypes.c_int),
    )


class MappedTensor(ctypes.Structure):
    """Of ``segment_maps.cu``."""

    _fields_ = (
        ("of_video", TensorMap),
        ("of_plain", TensorMap),
        ("address", ctypes.c_uint64),
        ("token_bytes", ctypes.c_int64),
        ("padding", ctypes.c_uint8 * 48),
    )


class SegmentMapsParams(ctypes.Structure):
    """``Params`` of ``segment_maps.cu``."""

    _fields_ = (
        ("tensors", MappedTensor * MAPPED_TENSORS),
        ("segments", ctypes.c_void_p),
        ("maps", ctypes.c_void_p),
        ("num_tensors", ctypes.c_int),
        ("num_segments", ctypes.c_int),
        ("padding", ctypes.c_uint8 * 40),
    )


def _schedule_of(index: type[ctypes.Structure], partition: type[ctypes.Structure], segments: bool) -> tuple:
    partitions = ("partitions", partition * (3 if segments else 2))
    return (
        ("rows", index),
        partitions,
        *((("num_long_tiles", ctypes.c_int),) if segments else ()),
        ("first_heads", ctypes.c_int),
        ("first_groups", ctypes.c_int),
        ("num_work_tiles", ctypes.c_int),
        ("heads", Divisor),
        ("kv_group", Divisor),
        ("consumers", Divisor),
        ("boxes_of_consumer", ctypes.c_int),
        ("taken", ctypes.c_void_p),
    )


class Structures(NamedTuple):
    """Those that depend on the layout of the tokens."""

    TokenTensor: Any
    TokenLayout: Any
    IndexTable: Any
    HeadPartition: Any
    Schedule: Any
    InverseSchedule: Any
    AttendForwardParams: Any
    BlockMeansOperand: Any
    BlockMeansParams: Any
    AttendBackwardQParams: Any
    PassOverQueriesParams: Any
    StoreDqParams: Any
    Inversion: Any
    PrepareBackwardParams: Any


def structures(segments: bool) -> Structures:
    """The structures as kernels have them that are compiled for segments, or for one video."""
    # The cache would take an argument by its name for another one.
    return _structures(segments)


@functools.cache
def _structures(segments: bool) -> Structures:

    def padding(count: int) -> tuple:
        # Of segments, tensor maps lie elsewhere.
        return () if segments else (("padding", ctypes.c_uint8 * count),)

    class TokenTensor(ctypes.Structure):
        _fields_ = (
            (("maps", ctypes.c_void_p), ("steps", HeadSteps), ("num_maps", ctypes.c_int))
            if segments
            else (("map", TensorMap), ("steps", HeadSteps), *padding(48))
        )

    of_segments = (
        ("table", ctypes.c_void_p),
        ("box", BoxShape),
        ("boxes", Divisor),
        ("partial", ctypes.c_int),
        ("length", ctypes.c_int),
    )
    of_video = (
        ("tiles_w", Divisor),
        ("tiles_h", Divisor),
        ("boxes_w", Divisor),
        ("boxes_h", Divisor),
        ("extent", Extent3),
        ("tile", Extent3),
        ("box", BoxShape),
        ("boxes", Divisor),
        ("partial", ctypes.c_int),
        ("sizes_are_64_bit", ctypes.c_int),
        ("sizes", ctypes.c_void_p),
    )

    class TokenLayout(ctypes.Structure):
        _fields_ = of_segments if segments else of_video

    class IndexTable(ctypes.Structure):
        _fields_ = (
            ("idx", ctypes.c_void_p),
            ("num", ctypes.c_void_p),
            ("width", ctypes.c_int),
            ("num_rows", ctypes.c_int),
            ("num_cols", ctypes.c_int),
            *((("order", ctypes.c_void_p), ("columns", ctypes.c_void_p)) if segments else ()),
        )

    class HeadPartition(ctypes.Structure):
        _fields_ = (
            ("query_groups", Divisor),
            *((("first_row", ctypes.c_int), ("end_row", ctypes.c_int)) if segments else ()),
            ("group_rows", ctypes.c_int),
            ("longer_groups", ctypes.c_int),
            ("windows", Divisor),
            ("window_groups", ctypes.c_int),
            ("longer_windows", ctypes.c_int),
        )

    class Schedule(ctypes.Structure):
        """``Schedule<IndexTable>``."""

        _fields_ = _schedule_of(IndexTable, HeadPartition, segments)

    class InverseSchedule(ctypes.Structure):
        """``Schedule<IndexBits>``."""

        _fields_ = _schedule_of(IndexBits, HeadPartition, segments)

    class AttendForwardParams(ctypes.Structure):
        """``Params`` of ``attend_forward.cu``."""

        _fields_ = (
            ("q", TokenTensor),
            ("k", TokenTensor),
            ("v", TokenTensor),
            ("out", ctypes.c_void_p),
            ("out_s", ctypes.c_void_p),
            ("out_strides", ctypes.c_int64 * 3),
            ("queries", TokenLayout),
            ("keys", TokenLayout),
            ("schedule", Schedule),
            ("lists", TileLists),
            ("lse", ctypes.c_void_p),
            ("coarse", CoarseOutput),
            ("q_len", ctypes.c_int),
            ("scale_log2", ctypes.c_float),
            *padding(32),
        )

    class BlockMeansOperand(ctypes.Structure):
        """``Operand`` of ``block_means.cu``."""

        _fields_ = (
            ("tensor", TokenTensor),
            ("mean", ctypes.c_void_p),
            ("num_items", ctypes.c_int),
            ("num_blocks", ctypes.c_int),
            ("heads", ctypes.c_int),
            *padding(44),
        )

    class BlockMeansParams(ctypes.Structure):
        """``Params`` of ``block_means.cu``."""

        _fields_ = (
            ("operands", BlockMeansOperand * 3),
            ("layouts", TokenLayout * 2),
            ("done", ctypes.c_void_p),
            ("heads_first", ctypes.c_int),
            *padding(4),
        )

    class AttendBackwardQParams(ctypes.Structure):
        """``Params`` of ``attend_backward_q.cu``."""

        _fields_ = (
            ("q", TokenTensor),
            ("k", TokenTensor),
            ("v", TokenTensor),
            ("dout", TokenTensor),
            ("dq", GradientTensor),
            ("queries", TokenLayout),
            ("keys", TokenLayout),
            ("schedule", Schedule),
            ("lists", TileLists),
            ("statistics", ctypes.c_void_p),
            ("scale", ctypes.c_float),
            ("scale_log2", ctypes.c_float),
            *padding(24),
        )

    class PassOverQueriesParams(ctypes.Structure):
        """``PassOverQueries`` of ``backward.cuh``: of the passes that keep keys in place."""

        _fields_ = (
            ("q", TokenTensor),
            ("k", TokenTensor),
            ("v", TokenTensor),
            ("dout", TokenTensor),
            ("dq", ctypes.c_void_p),
            ("dk", GradientTensor),
            ("dv", GradientTensor),
            ("queries", TokenLayout),
            ("keys", TokenLayout),
            ("schedule", InverseSchedule),
            ("lists", TileLists),
            ("statistics", ctypes.c_void_p),
            ("scale", ctypes.c_float),
            ("scale_log2", ctypes.c_float),
            *padding(40),
        )

    class StoreDqParams(ctypes.Structure):
        """``Params`` of ``store_dq.cu``."""

        _fields_ = (
            ("sums", ctypes.c_void_p),
            ("dq", GradientTensor),
            ("lse", ctypes.c_void_p),
            ("queries", TokenLayout),
            ("heads", ctypes.c_int),
            ("num_blocks", ctypes.c_int),
            ("q_len", ctypes.c_int),
            ("scale", ctypes.c_float),
        )

    class Inversion(ctypes.Structure):
        """``Inversion`` of ``invert_map.cuh``."""

        _fields_ = (("rows", IndexTable), ("bits", ctypes.c_void_p), ("num_words", ctypes.c_int))

    class PrepareBackwardParams(ctypes.Structure):
        """``Params`` of ``prepare_backward.cu``."""

        _fields_ = (
            ("dout", ctypes.c_void_p),
            ("out_s", ctypes.c_void_p),
            ("dout_strides", ctypes.c_int64 * 3),
            ("out_s_strides", ctypes.c_int64 * 3),
            ("lse", ctypes.c_void_p),
            ("dlse", ctypes.c_void_p),
            ("statistics", ctypes.c_void_p),
            ("counters", ctypes.c_void_p),
            ("coarse", CoarseOutput),
            ("dgate", ctypes.c_void_p),
            ("dgate_strides", ctypes.c_int64 * 3),
            ("dout_c", ctypes.c_void_p),
            ("queries", TokenLayout),
            ("heads", ctypes.c_int),
            ("num_blocks", ctypes.c_int),
            ("q_len", ctypes.c_int),
            ("shift_factor", ctypes.c_float),
            ("delta_factor", ctypes.c_float),
            ("is_combined", ctypes.c_int),
            ("inversion", Inversion),
            ("inversion_blocks", ctypes.c_int),
        )

    return Structures(
        TokenTensor,
        TokenLayout,
        IndexTable,
        HeadPartition,
        Schedule,
        InverseSchedule,
        AttendForwardParams,
        BlockMeansOperand,
        BlockMeansParams,
        AttendBackwardQParams,
        PassOverQueriesParams,
        StoreDqParams,
        Inversion,
        PrepareBackwardParams,
    )
