"""How TMA reads q, k and v where they lie: a tensor in any memory order as the five dimensions of a tensor map."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from vsa_jit.backends.sm90.layout import View
from vsa_jit.backends.sm90.structs import HeadSteps
from vsa_jit.jit.driver import TensorMap, encode_tensor_map
from vsa_jit.problem import Problem, Side, axes

INT32_MAX = 2**31 - 1
# TMA's rules: addresses and strides are multiples of 16 bytes, and strides less than 2^40 bytes.
ALIGNMENT_BYTES = 16
STRIDE_LIMIT_BYTES = 2**40

# A tensor's address, and its strides in elements. A bare tuple: every call makes some, and one with names takes several
# times as long.
TensorRef: TypeAlias = tuple[int, tuple[int, ...]]


def tensor_ref(x: Tensor | None) -> TensorRef | None:
    return None if x is None else (x.data_ptr(), x.stride())


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


def _heads_of(problem: Problem, side: Side, tensor: TensorRef) -> Heads:
    _, strides = tensor
    batch_stride, head_stride, _, _ = (strides[axis] for axis in axes(side.layout))
    return heads_of(problem.batch, side.heads, problem.head_dim, batch_stride, head_stride)


def head_steps(problem: Problem, side: Side, tensor: TensorRef) -> HeadSteps:
    """Where the heads of a tensor are in its map."""
    heads = _heads_of(problem, side, tensor)
    return HeadSteps(heads.head_channel, heads.batch_channel, heads.head_outer, heads.batch_outer)


def token_map(
    problem: Problem,
    side: Side,
    view: View,
    dtype: torch.dtype,
    device: int,
    tensor: TensorRef,
    channels: int,
    swizzle: int,
) -> TensorMap:
    """The tensor map of q, k, v or a tensor like them.

    Args:
        side: whose tensor it is; ``view`` is how TMA sees its tokens.
        channels: how many of a head's a box has.
    """
    address, strides = tensor
    # Of a single token any stride does, but not to TMA.
    token_stride = strides[axes(side.layout)[2]] if side.length > 1 else problem.head_dim
    heads = _heads_of(problem, side, tensor)
    frames, height, width = view.extent
    extents = (width, height, frames, heads.outer)
    steps = (token_stride, token_stride * width, token_stride * width * height, heads.outer_stride)
    return encode_tensor_map(
        device,
        address,
        dtype,
        (heads.channels, *extents),
        # What is one long is never stepped along, and any stride that TMA takes does.
        tuple(step if extent > 1 else problem.head_dim for extent, step in zip(extents, steps, strict=True)),
        (channels, *reversed(view.box), 1),
        swizzle,
    )


def largest_grid(side: Side) -> tuple[int, int, int] | None:
    """The video with the largest frame, or None where there is no video."""
    if side.segments is None:
        return side.grid
    grids = [segment.grid for segment in side.segments.segments if segment.grid is not None]
    return max(grids, key=lambda grid: grid[1] * grid[2], default=None)


def why_not_tma(x: Tensor, grid: tuple[int, int, int] | None) -> str | None:
    """Why TMA cannot read a [B, H, S, D] view of tokens among which is a video of this size. None: it can."""
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
