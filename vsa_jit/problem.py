"""What a call says, as one frozen record."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
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
        numbers = None if segments is None else tuple(segments)
        said = (q.shape, k.shape, (tile[0], tile[1], tile[2]), numbers, layout, softmax_scale)
        if torch.compiler.is_compiling():
            return _problem_of(*said)
        try:
            return _known_problem_of(*said)
        except TypeError:
            # Numbers that are symbolic have no hash.
            return _problem_of(*said)

    @property
    def block(self) -> int:
        """Tokens of a full block, of queries and of keys."""
        return self.keys.block

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.queries.heads // self.keys.heads

    @property
    def map_shape(self) -> tuple[int, int, int, int]:
        """Of a map of blocks."""
        return self.batch, self.queries.heads, self.queries.num_blocks, self.keys.num_blocks

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


def _problem_of(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    tile: tuple[int, int, int],
    segments: Sequence[int] | None,
    layout: str,
    softmax_scale: float,
) -> Problem:
    batch, heads, q_len, head_dim = _sizes(q_shape, layout)
    _, kv_heads, kv_len, _ = _sizes(k_shape, layout)
    order = order_of(segments, tile)
    queries, keys = (
        Side(heads, length, tile, order.grid, layout, order.segments)
        for heads, length in ((heads, q_len), (kv_heads, kv_len))
    )
    return Problem(batch, head_dim, queries, keys, softmax_scale)


_known_problem_of = functools.lru_cache(maxsize=1024)(_problem_of)


class Coarse(NamedTuple):
    """What the coarse branch of a call is told besides its tensors.

    Attributes:
        segments: None where all blocks belong to one sample that has no context.
        selection_dtype: to which each step is rounded; all arithmetic is in fp32.
    """

    segments: Segments | None
    softmax_scale: float
    selection_dtype: torch.dtype


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


# Of the block means of q, k and v, from that of the coarse output, which is None where there is none: then there may be
# no gradient of v's means either.
MeanGradients: TypeAlias = Callable[[Tensor | None], tuple[Tensor, Tensor, Tensor | None]]


def has_coarse_output(gate: Tensor | None, gate_value: float) -> bool:
    """Whether a coarse output is added: not where its weight is the number 0."""
    return gate is not None or gate_value != 0.0


# Of a coarse output that weighs no more, the one before it was added follows from the output; the error of the coarse
# one's rounding would be multiplied by a larger weight.
LARGEST_RECOVERED_WEIGHT = 1.0


def keeps_out_s(gate: Tensor | None, gate_value: float) -> bool:
    """Whether a backward is given the output before the coarse one was added."""
    return gate is not None or abs(gate_value) > LARGEST_RECOVERED_WEIGHT


def axes(layout: str) -> tuple[int, int, int, int]:
    """Where batch, head, sequence and head dimension lie in a tensor of this layout."""
    return (0, 1, 2, 3) if layout == "bhsd" else (0, 2, 1, 3)


def sizes_of(x: Tensor, layout: str) -> tuple[int, int, int, int]:
    """Batch, heads, length and head dimension."""
    return _sizes(x.shape, layout)


def _sizes(shape: Sequence[int], layout: str) -> tuple[int, int, int, int]:
    batch, heads, length, head_dim = shape
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
