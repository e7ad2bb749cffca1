"""The host's side of ``segments.cuh``: the table of boxes, the order of rows, and the tensor maps of segments."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vsa_jit.backends.sm90 import specialise
from vsa_jit.backends.sm90.layout import View, box_of, box_shape, divisor
from vsa_jit.backends.sm90.structs import BOX_TOKENS, BoxRecord, SegmentExtent, SegmentMapsParams, structures
from vsa_jit.backends.sm90.tma import TensorRef, token_map
from vsa_jit.jit import driver, module
from vsa_jit.problem import Problem, Side, axes
from vsa_jit.segments import Segment, Segments
from vsa_jit.tables import on_device

TENSOR_MAP_BYTES = ctypes.sizeof(driver.TensorMap)
# What 16 bits of a box's record count.
LONGEST_SIDE = (1 << 16) - 1
# A box of plain tokens, as TMA loads it.
PLAIN_BOX = (1, 1, BOX_TOKENS)
BYTE, HALF = 8, 16


def why_not(segments: Segments) -> str | None:
    """Why the kernels cannot take these segments. None: they can."""
    for segment in segments.segments:
        if segment.grid is not None and max(segment.grid[1:]) > LONGEST_SIDE:
            return f"the kernels take videos of up to {LONGEST_SIDE} tokens in height and width, one is {segment.grid}"
    return None


def segment_layout(side: Side) -> Any:
    """``TokenLayout`` of segments; where its table is, ``SegmentTables`` says."""
    return structures(segments=True).TokenLayout(
        box=box_shape(box_of(side.tile)),
        boxes=divisor(side.block // BOX_TOKENS),
        partial=side.is_partial,
        length=side.length,
    )


class SegmentTables(NamedTuple):
    """What the kernels read of segments on a device: addresses in one table that is kept there."""

    boxes: int
    extents: int
    order: int
    columns: int

    @classmethod
    def of(cls, segments: Segments, device: torch.device) -> SegmentTables:
        table = on_device(("sm90", segments), device, lambda: _table_of(segments))
        num_boxes = segments.num_blocks * math.prod(segments.tile) // BOX_TOKENS
        boxes = table.data_ptr()
        extents = boxes + num_boxes * ctypes.sizeof(BoxRecord)
        order = extents + len(segments.segments) * ctypes.sizeof(SegmentExtent)
        return cls(boxes, extents, order, order + segments.num_blocks * ctypes.sizeof(ctypes.c_int))


def _table_of(segments: Segments) -> Tensor:
    """int32 on the CPU: a ``BoxRecord`` for each box, a ``SegmentExtent`` for each segment, the blocks in the order in
    which they are taken as rows, those of context first, and all blocks with one after them that does not exist."""
    boxes: list[Tensor] = []
    extents: list[Tensor] = []
    long_rows: list[Tensor] = []
    rows: list[Tensor] = []
    first_place = 0
    for number, segment in enumerate(segments.segments):
        origin, token, rows_of, valid, count = _boxes_of(segment, segments.tile)
        place = first_place + count.cumsum(0) - count
        first_place += segment.length
        zero = torch.zeros_like(count)
        boxes.append(torch.stack((zero + number, *origin, token, zero + rows_of, valid, place), 1))
        is_plain = segment.grid is None
        extent = segment.grid or (1, 1, segment.length)
        extents.append(torch.tensor([segment.first_token, *extent, is_plain, 0, 0, 0]))
        of_segment = torch.arange(segment.first_block, segment.first_block + segment.num_blocks)
        (long_rows if is_plain else rows).append(of_segment)
    columns = torch.arange(segments.num_blocks + 1)
    parts = [*boxes, *extents, *long_rows, *rows, columns]
    return torch.cat([part.flatten() for part in parts]).int()


def _boxes_of(segment: Segment, tile: tuple[int, int, int]) -> tuple[Sequence[Tensor], Tensor, int, Tensor, Tensor]:
    """Of the boxes of a segment: (t, h, w), ``first_token``, ``rows_of`` and ``valid`` of ``BoxRecord``, and the number
    of tokens, int64 [n]."""
    box = box_of(tile)
    boxes_of_tile = [side // part for side, part in zip(tile, box, strict=True)]
    if segment.grid is None:
        first = torch.arange(segment.num_blocks * boxes_of_tile[0] * boxes_of_tile[1] * boxes_of_tile[2]) * BOX_TOKENS
        count = (segment.length - first).clamp(0, BOX_TOKENS)
        zero = torch.zeros_like(first)
        origin = zero, zero, first
        token, height, width = segment.first_token + first, box[1], box[2]
        bound, extents = count, [torch.where(count > 0, side, 0) for side in box]
    else:
        tiles = [-(-extent // side) for extent, side in zip(segment.grid, tile, strict=True)]
        axes_of = [
            (torch.arange(number)[:, None] * side + torch.arange(inside) * part)
            for number, side, inside, part in zip(tiles, tile, boxes_of_tile, box, strict=True)
        ]
        # Tiles first, then the boxes of each; of both w is fastest.
        t = axes_of[0][:, None, None, :, None, None]
        h = axes_of[1][None, :, None, None, :, None]
        w = axes_of[2][None, None, :, None, None, :]
        origin = tuple(x.flatten() for x in torch.broadcast_tensors(t, h, w))
        _, height, width = segment.grid
        token = segment.first_token + (origin[0] * height + origin[1]) * width + origin[2]
        extents = [
            (extent - start).clamp(0, side) for extent, start, side in zip(segment.grid, origin, box, strict=True)
        ]
        count = extents[0] * extents[1] * extents[2]
        bound = torch.where(count > 0, BOX_TOKENS, 0)
    packed = bound | extents[0] << BYTE | extents[1] << HALF | extents[2] << HALF + BYTE
    # A box without tokens must not look whole.
    valid = torch.where(count == BOX_TOKENS, 0, torch.where(count == 0, 1 << BYTE, packed))
    return origin, token, height | width << HALF, valid, count


class SegmentMaps(NamedTuple):
    """The launch that makes the tensor maps of some tensors, but for the addresses that every call has anew."""

    params: SegmentMapsParams
    launcher: driver.Launcher

    @classmethod
    def of(
        cls,
        problem: Problem,
        tensors: Sequence[tuple[Side, TensorRef]],
        dtype: torch.dtype,
        device: int,
        channels: int,
        swizzle: int,
    ) -> SegmentMaps:
        """That of tensors whose boxes have so many ``channels`` of a head."""
        params = SegmentMapsParams(num_tensors=len(tensors))
        for mapped, (side, tensor) in zip(params.tensors, tensors, strict=False):
            assert side.segments is not None
            params.num_segments = len(side.segments.segments)
            views = View(side.tile, side.tile, box_of(side.tile)), View(PLAIN_BOX, PLAIN_BOX, PLAIN_BOX)
            mapped.of_video, mapped.of_plain = (
                token_map(problem, side, view, dtype, device, tensor, channels, swizzle) for view in views
            )
            mapped.address = tensor[0]
            mapped.token_bytes = tensor[1][axes(side.layout)[2]] * dtype.itemsize if side.length > 1 else 0
        return cls(params, module.launcher(specialise.segment_maps(), device))

    def make(self, of_kernel: Sequence[Any], like: Tensor, tables: SegmentTables) -> Tensor:
        """Launches, and says to a kernel where the maps are.

        Args:
            of_kernel: ``TokenTensor`` of each tensor, among the kernel's parameters.
            like: a tensor of the call.

        Returns:
            The maps, which must not be freed before the kernel is launched.
        """
        params = SegmentMapsParams.from_buffer_copy(self.params)
        count = params.num_tensors * params.num_segments
        maps = like.new_empty(count * TENSOR_MAP_BYTES, dtype=torch.uint8)
        params.maps, params.segments = maps.data_ptr(), tables.extents
        for i, tensor in enumerate(of_kernel):
            tensor.maps = maps.data_ptr() + i * params.num_segments * TENSOR_MAP_BYTES
        threads = specialise.WARPGROUP_THREADS
        self.launcher(-(-count // threads), params)
        return maps
