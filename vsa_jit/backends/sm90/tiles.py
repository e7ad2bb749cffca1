"""How TMA reads blocks: a tensor in any order of tokens as five dimensions, and a block as boxes of 64 tokens."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from vsa_jit.problem import Problem

BOX_TOKENS = 64
INT32_MAX = 2**31 - 1
# TMA's rules: addresses and strides are multiples of 16 bytes, and strides less than 2^40 bytes.
ALIGNMENT_BYTES = 16
STRIDE_LIMIT_BYTES = 2**40


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


def video_of(problem: Problem, length: int) -> tuple[int, int, int]:
    """Tokens of a sequence along (t, h, w): one that is no video is one row of one frame."""
    return (1, 1, length) if problem.grid is None else problem.grid


def tile_of(problem: Problem) -> tuple[int, int, int]:
    """A block along (t, h, w)."""
    return (1, 1, problem.block) if problem.grid is None else problem.tile


def box_of(tile: tuple[int, int, int]) -> tuple[int, int, int]:
    """A box of 64 tokens that tiles the block. There always is one: a multiple of 64 has six factors of two."""
    sides = []
    left = BOX_TOKENS
    for side in reversed(tile):
        part = math.gcd(side, left)
        sides.append(part)
        left //= part
    return sides[2], sides[1], sides[0]


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
