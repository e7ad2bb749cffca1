"""How TMA reads blocks: a tensor in any order of tokens as five dimensions, and a block as boxes of 64 tokens."""

from __future__ import annotations

import ctypes
import math
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from vsa_jit.jit.driver import SWIZZLE_NONE, TensorMap, tensor_map
from vsa_jit.problem import Problem, Side, axes

BOX_TOKENS = 64
INT32_MAX = 2**31 - 1
# TMA's rules: addresses and strides are multiples of 16 bytes, and strides less than 2^40 bytes.
ALIGNMENT_BYTES = 16
STRIDE_LIMIT_BYTES = 2**40


# Where a tensor is: its address, and its strides in elements. And where the sizes of blocks are, and whether they are
# of 64 bits. Bare tuples: every call makes some, and ones with names take several times as long.
Place: TypeAlias = tuple[int, tuple[int, ...]]
Sizes: TypeAlias = tuple[int, bool]


def place_of(x: Tensor | None) -> Place | None:
    return None if x is None else (x.data_ptr(), x.stride())


def sizes_of(sizes: Tensor | None) -> Sizes | None:
    return None if sizes is None else (sizes.data_ptr(), sizes.dtype == torch.int64)


class Heads(NamedTuple):
    """Where heads and batches are among the five dimensions (channels, w, h, t, outer).

    A step of head or batch moves the first coordinate by ``*_channel``, or the last by ``*_outer``.
    """

    channels: int
    outer: int
    outer_stride: int
    head_channel: int
    head_outer: int
    batch_channel: int
    batch_outer: int


class HeadSteps(ctypes.Structure):
    """The steps of ``Heads``, as ``kernels_src/vsa/tokens.cuh`` describes them."""

    _fields_ = (
        ("head_channel", ctypes.c_int),
        ("batch_channel", ctypes.c_int),
        ("head_outer", ctypes.c_int),
        ("batch_outer", ctypes.c_int),
    )


def heads_of(batch: int, heads: int, head_dim: int, batch_stride: int, head_stride: int) -> Heads:
    """Fits batch and head into the last dimension or, where they do not go together, the nearer into the channels."""
    if batch == 1:
        return Heads(head_dim, heads, head_stride, 0, 1, 0, 0)
    if heads == 1:
        return Heads(head_dim, batch, batch_stride, 0, 0, 0, 1)
    if batch_stride == heads * head_stride:
        return Heads(head_dim, batch * heads, head_stride, 0, 1, 0, heads)
    if head_stride <= batch_stride:
        return Heads((heads - 1) * head_stride + head_dim, batch, batch_stride, head_stride, 0, 0, 1)
    return Heads((batch - 1) * batch_stride + head_dim, heads, head_stride, 0, 1, batch_stride, 0)


def video_of(side: Side) -> tuple[int, int, int]:
    """Tokens of a sequence along (t, h, w): one that is no video is one row of one frame."""
    return (1, 1, side.length) if side.grid is None else side.grid


def tile_of(side: Side) -> tuple[int, int, int]:
    """A block along (t, h, w)."""
    return (1, 1, side.block) if side.grid is None else side.tile


def box_of(tile: tuple[int, int, int]) -> tuple[int, int, int]:
    """A box of 64 tokens that tiles the block. There always is one: a multiple of 64 has six factors of two."""
    sides = []
    left = BOX_TOKENS
    for side in reversed(tile):
        part = math.gcd(side, left)
        sides.append(part)
        left //= part
    return sides[2], sides[1], sides[0]


def map_of(
    problem: Problem,
    side: Side,
    dtype: torch.dtype,
    device: int,
    place: Place,
    video: tuple[int, int, int],
    box: tuple[int, int, int],
    channels: int,
    swizzle: int = SWIZZLE_NONE,
) -> tuple[TensorMap, HeadSteps]:
    """The tensor map of q, k, v or a tensor like them, for boxes of so many channels, and where in it its heads are.

    Args:
        side: whose tensor it is.
        video: the sequence as (frames, height, width), see ``video_of``.
        box: tokens of a box along (t, h, w).
    """
    address, strides = place
    batch_stride, head_stride, token_stride, _ = (strides[axis] for axis in axes(side.layout))
    in_map = heads_of(problem.batch, side.heads, problem.head_dim, batch_stride, head_stride)
    frames, height, width = video
    extents = (width, height, frames, in_map.outer)
    steps = (token_stride, token_stride * width, token_stride * width * height, in_map.outer_stride)
    encoded = tensor_map(
        device,
        address,
        dtype,
        (in_map.channels, *extents),
        # What is one long is never stepped along, and any stride that TMA takes does.
        tuple(step if extent > 1 else problem.head_dim for extent, step in zip(extents, steps, strict=True)),
        (channels, box[2], box[1], box[0], 1),
        swizzle,
    )
    steps_of_heads = HeadSteps(in_map.head_channel, in_map.batch_channel, in_map.head_outer, in_map.batch_outer)
    return encoded, steps_of_heads


def why_not_tma(x: Tensor, grid: tuple[int, int, int] | None) -> str | None:
    """Why TMA cannot read a [B, H, S, D] view. None: it can."""
    if x.data_ptr() % ALIGNMENT_BYTES != 0:
        return f"TMA needs an address that is a multiple of {ALIGNMENT_BYTES} bytes"
    strides = [stride for extent, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if extent > 1]
    size = x.element_size()
    odd = [stride * size for stride in strides if stride * size % ALIGNMENT_BYTES != 0]
    if odd:
        return f"TMA needs strides that are multiples of {ALIGNMENT_BYTES} bytes, got {min(odd)}"
    frame = 1 if grid is None else grid[1] * grid[2]
    longest = max([stride * size for stride in strides] + [x.stride(2) * size * frame])
    if longest >= STRIDE_LIMIT_BYTES:
        return f"TMA needs strides below 2^40 bytes, got {longest}"
    batch, heads, _, head_dim = x.shape
    if heads_of(batch, heads, head_dim, x.stride(0), x.stride(1)).channels > INT32_MAX:
        return "neither heads nor batches lie close enough together for TMA"
    return None
