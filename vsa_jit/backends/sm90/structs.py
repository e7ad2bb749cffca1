"""The structures of the kernels' parameters, as C++ has them, and the constants that both languages need.

Each class is the twin of the C++ structure of its name in ``kernels_src/vsa``, whose comments say what the fields are.
Compilers check the offset of every field against these classes, see ``params.cuh``. ``padding`` is what C++ adds to a
structure that is aligned like the tensor map in it.
"""

from __future__ import annotations

import ctypes

from vsa_jit.jit.driver import TensorMap

# Tokens of a box, which TMA loads at a time.
BOX_TOKENS = 64
# Consumer warpgroups of a thread block, each with one query box at a time.
CONSUMERS = 3
# Work tiles that a thread block has at a time: one is attended while the next one's list is written.
WORK_TILES = 2
# Of a key tile in a list.
KEY_TILE_BYTES = 16


class Extent3(ctypes.Structure):
    _fields_ = (("t", ctypes.c_int), ("h", ctypes.c_int), ("w", ctypes.c_int))


class Divisor(ctypes.Structure):
    _fields_ = (("value", ctypes.c_int), ("inverse", ctypes.c_uint32), ("shift", ctypes.c_int))


class HeadSteps(ctypes.Structure):
    _fields_ = (
        ("head_channel", ctypes.c_int),
        ("batch_channel", ctypes.c_int),
        ("head_outer", ctypes.c_int),
        ("batch_outer", ctypes.c_int),
    )


class TokenTensor(ctypes.Structure):
    _fields_ = (
        ("map", TensorMap),
        ("steps", HeadSteps),
        ("padding", ctypes.c_uint8 * 48),
    )


class TokenLayout(ctypes.Structure):
    _fields_ = (
        ("tiles_w", Divisor),
        ("tiles_h", Divisor),
        ("boxes_w", Divisor),
        ("boxes_h", Divisor),
        ("extent", Extent3),
        ("tile", Extent3),
        ("box", Extent3),
        ("box_w_log2", ctypes.c_int),
        ("box_hw_log2", ctypes.c_int),
        ("boxes", Divisor),
        ("partial", ctypes.c_int),
        ("sizes_are_64_bit", ctypes.c_int),
        ("sizes", ctypes.c_void_p),
    )


class IndexTable(ctypes.Structure):
    _fields_ = (
        ("idx", ctypes.c_void_p),
        ("num", ctypes.c_void_p),
        ("width", ctypes.c_int),
        ("num_rows", ctypes.c_int),
        ("num_cols", ctypes.c_int),
    )


class HeadPartition(ctypes.Structure):
    _fields_ = (
        ("query_groups", Divisor),
        ("group_rows", ctypes.c_int),
        ("longer_groups", ctypes.c_int),
        ("windows", Divisor),
        ("window_groups", ctypes.c_int),
        ("longer_windows", ctypes.c_int),
    )


class Schedule(ctypes.Structure):
    _fields_ = (
        ("rows", IndexTable),
        ("partitions", HeadPartition * 2),
        ("first_heads", ctypes.c_int),
        ("first_groups", ctypes.c_int),
        ("num_work_tiles", ctypes.c_int),
        ("heads", Divisor),
        ("kv_group", Divisor),
        ("next", ctypes.c_void_p),
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
        ("padding", ctypes.c_uint8 * 48),
    )


class BlockMeansOperand(ctypes.Structure):
    """``Operand`` of ``block_means.cu``."""

    _fields_ = (
        ("tensor", TokenTensor),
        ("mean", ctypes.c_void_p),
        ("num_items", ctypes.c_int),
        ("num_blocks", ctypes.c_int),
        ("heads", ctypes.c_int),
        ("padding", ctypes.c_uint8 * 44),
    )


class BlockMeansParams(ctypes.Structure):
    """``Params`` of ``block_means.cu``."""

    _fields_ = (
        ("operands", BlockMeansOperand * 3),
        ("layouts", TokenLayout * 2),
        ("heads_first", ctypes.c_int),
        ("padding", ctypes.c_uint8 * 12),
    )
