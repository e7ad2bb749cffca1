"""The host's side of ``video.cuh``: a sequence in any order as a video, cut into tiles, and these into boxes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from vsa_jit.backends.sm90.structs import BOX_TOKENS, BoxShape, Divisor, Extent3, structures
from vsa_jit.problem import Side

# Where a tensor of block sizes is, and whether they are of 64 bits. A bare tuple: every call makes some, and one with
# names takes several times as long.
SizesRef: TypeAlias = tuple[int, bool]


def sizes_ref(sizes: Tensor | None) -> SizesRef | None:
    return None if sizes is None else (sizes.data_ptr(), sizes.dtype == torch.int64)


class View(NamedTuple):
    """A sequence as a video: its extent, its tiles and its boxes along (t, h, w)."""

    extent: tuple[int, int, int]
    tile: tuple[int, int, int]
    box: tuple[int, int, int]


def view_of(side: Side, *, padded: bool = False) -> View:
    """How TMA sees the queries or the keys of a call.

    A sequence that is no video is one row of one frame.

    Args:
        padded: blocks have sizes, and what is not valid must arrive as zeros: every box is then a row of its own, and
            one that starts before its row gets zeros from there.
    """
    if padded:
        extent = (1, side.length // BOX_TOKENS, BOX_TOKENS)
        tile = (1, side.block // BOX_TOKENS, BOX_TOKENS)
    elif side.grid is None:
        extent, tile = (1, 1, side.length), (1, 1, side.block)
    else:
        extent, tile = side.grid, side.tile
    return View(extent, tile, box_of(tile))


def box_of(tile: tuple[int, int, int]) -> tuple[int, int, int]:
    """A box of 64 tokens that tiles the block. There always is one: a multiple of 64 has six factors of two."""
    sides = []
    left = BOX_TOKENS
    for side in reversed(tile):
        part = math.gcd(side, left)
        sides.append(part)
        left //= part
    return sides[2], sides[1], sides[0]


def divisor(value: int) -> Divisor:
    shift = (value - 1).bit_length()
    return Divisor(value, -(-(1 << 31 + shift) // value), shift)


def box_shape(box: tuple[int, int, int]) -> BoxShape:
    return BoxShape(Extent3(*box), box[2].bit_length() - 1, (box[1] * box[2]).bit_length() - 1)


def token_layout(side: Side, view: View, sizes: SizesRef | None) -> Any:
    """How a sequence is cut into blocks and boxes.

    Args:
        sizes: valid tokens of each block; None where all that are inside the video are valid.
    """
    extent, tile, box = view
    layout = structures(segments=False).TokenLayout(
        tiles_w=divisor(-(-extent[2] // tile[2])),
        tiles_h=divisor(-(-extent[1] // tile[1])),
        boxes_w=divisor(tile[2] // box[2]),
        boxes_h=divisor(tile[1] // box[1]),
        extent=Extent3(*extent),
        tile=Extent3(*tile),
        box=box_shape(box),
        boxes=divisor(side.block // BOX_TOKENS),
        partial=sizes is not None or side.is_partial,
    )
    if sizes is not None:
        layout.sizes, layout.sizes_are_64_bit = sizes
    return layout
