"""What a call says, as one frozen record."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from vsa_jit.segments import Segments, order_of

Layout: TypeAlias = Literal["bhsd", "bshd"]
Context: TypeAlias = Literal["attend", "compete"]
# Plain tokens and videos, of one sample or, in lists, of several.
_Segment: TypeAlias = int | Sequence[int]
SegmentList: TypeAlias = Sequence[_Segment] | Sequence[Sequence[_Segment]]
BackendName: TypeAlias = Literal["auto", "sm90", "triton", "torch"]
TILE_OF_TOKENS = {64: (4, 4, 4), 128: (2, 8, 8), 256: (4, 8, 8)}


class Side(NamedTuple):
    """The queries of a call, or its keys: where their tokens lie, and how they are cut into blocks.

    ``tile`` is the block as a video tile ``(t, h, w)``. Tokens are one video of size ``grid``, or several ``segments``;
    with neither of them only the tile's product counts, and blocks are runs of consecutive tokens: the last one
    partial, or each one's valid tokens counted by a tensor of block sizes.
    """

    heads: int
    length: int
    tile: tuple[int, int, int]
    grid: tuple[int, int, int] | None
    layout: str
    segments: Segments | None = None

    @property
    def block(self) -> int:
        """Tokens of a full block."""
        return math.prod(self.tile)

    @property
    def num_blocks(self) -> int:
        if self.segments is not None:
            return self.segments.num_blocks
        if self.grid is None:
            return -(-self.length // self.block)
        return math.prod([-(-extent // side) for extent, side in zip(self.grid, self.tile, strict=True)])

    @property
    def is_partial(self) -> bool:
        """Whether some block is cut by the end of the sequence, or by the border of the video."""
        if self.segments is not None:
            return self.segments.is_partial
        if self.grid is None:
            return self.length % self.block != 0
        return any([extent % side != 0 for extent, side in zip(self.grid, self.tile, strict=True)])


class Problem(NamedTuple):
    """Shapes and settings of one call, independent of which order its tokens are in.

    A tuple: what depends on the call is kept under it, and looked up at every call.
    """

    batch: int
    head_dim: int
    queries: Side
    keys: Side
    softmax_scale: float

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        tile: Sequence[int],
        segments: Sequence[int] | None,
        layout: str,
        softmax_scale: float,
    ) -> Problem:
        """The record of a call whose arguments were checked already.

        Args:
            segments: the numbers of ``Segments.numbers``, or None for a sequence without any.
        """
        batch, heads, q_len, head_dim = sizes_of(q, layout)
        _, kv_heads, kv_len, _ = sizes_of(k, layout)
        tile = (tile[0], tile[1], tile[2])
        order = order_of(segments, tile)
        queries, keys = (
            Side(heads, length, tile, order.grid, layout, order.segments)
            for heads, length in ((heads, q_len), (kv_heads, kv_len))
        )
        return cls(batch, head_dim, queries, keys, softmax_scale)

    @property
    def block(self) -> int:
        """Tokens of a full block, of queries and of keys."""
        return self.keys.block

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.queries.heads // self.keys.heads

    @property
    def static(self) -> tuple[list[int], list[int] | None, str, float]:
        """What an operator is told besides its tensors; ``of`` reads it back."""
        side = self.queries
        numbers: list[int] | None = None
        if side.segments is not None:
            numbers = list(side.segments.numbers)
        elif side.grid is not None:
            numbers = [0, *side.grid]
        return list(side.tile), numbers, side.layout, self.softmax_scale

    @property
    def static_of_blocks(self) -> tuple[list[int], list[int] | None, float]:
        """The same for an operator that sees block means alone; a video's blocks need no more to be said of them."""
        tile, numbers, _, softmax_scale = self.static
        return tile, None if self.keys.segments is None else numbers, softmax_scale


class Operands(NamedTuple):
    """What the fine branch attends, and the coarse output that it adds; shapes as in ``ops.attention.attend``."""

    q: Tensor
    k: Tensor
    v: Tensor
    q2k_idx: Tensor
    q2k_num: Tensor
    q_sizes: Tensor | None
    kv_sizes: Tensor | None
    out_c: Tensor | None
    gate: Tensor | None
    gate_value: float


class Gradients(NamedTuple):
    """Of the fine branch; None where there is none or it was not asked for."""

    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    dgate: Tensor | None
    dout_c: Tensor | None


def axes(layout: str) -> tuple[int, int, int, int]:
    """Where batch, head, sequence and head dimension lie in a tensor of this layout."""
    return (0, 1, 2, 3) if layout == "bhsd" else (0, 2, 1, 3)


def sizes_of(x: Tensor, layout: str) -> tuple[int, int, int, int]:
    """Batch, heads, length and head dimension."""
    batch, heads, length, head_dim = x.shape
    return (batch, heads, length, head_dim) if layout == "bhsd" else (batch, length, heads, head_dim)


def contiguous_like(x: Tensor) -> Tensor:
    """Uninitialised and contiguous."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def empty_like(x: Tensor) -> Tensor:
    """Uninitialised, in the memory order of ``x``, but always with a contiguous last dimension."""
    empty = torch.empty_like(x)
    return empty if empty.stride(-1) == 1 else contiguous_like(x)


def bhsd(x: Tensor, layout: str) -> Tensor:
    """The tensor as a [B, H, S, D] view."""
    return x if layout == "bhsd" else x.transpose(1, 2)
