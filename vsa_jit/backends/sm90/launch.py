"""What launches of the attention kernels share: tensor maps of what they read, and the lists of their work tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vsa_jit.backends.sm90.layout import SizesRef, View, token_layout, view_of
from vsa_jit.backends.sm90.segments import SegmentMaps, SegmentTables, segment_layout
from vsa_jit.backends.sm90.structs import KEY_TILE_BYTES, WORK_TILES, CoarseOutput, structures
from vsa_jit.backends.sm90.tma import TensorRef, head_steps, token_map
from vsa_jit.jit import driver
from vsa_jit.problem import Operands, Problem, Side, axes

LOG2E = math.log2(math.e)
# What TMA writes with a swizzle of 128 bytes: channels at a time.
PANEL_CHANNELS = 64
# The counter of work tiles lies behind the lists where a call has no other.
COUNTER_BYTES = 4


class Launch(NamedTuple):
    """All of a launch but the addresses that every call has anew.

    Attributes:
        maps: the launch before it that makes the tensor maps of segments, or None.
    """

    params: Any
    blocks: int
    launcher: driver.Launcher
    list_bytes: int = 0
    maps: SegmentMaps | None = None

    def new_params(self) -> Any:
        """A copy of the parameters, for one call."""
        return type(self.params).from_buffer_copy(self.params)

    def set_segments(
        self, tables: SegmentTables | None, like: Tensor, layouts: Sequence[Any], tensors: Sequence[Any] = ()
    ) -> Tensor | None:
        """Says to layouts and tensors among the parameters of a call where their tables and their maps are.

        Args:
            tables: None where the tokens are no segments: then there is nothing to say.
            like: a tensor of the call.

        Returns:
            The maps, which it makes; they must not be freed before the kernel is launched.
        """
        if tables is None:
            return None
        for layout in layouts:
            layout.table = tables.boxes
        return None if self.maps is None else self.maps.make(tensors, like, tables)

    def run(self, params: Any) -> None:
        self.launcher(self.blocks, params)

    @classmethod
    def of_work_tiles(
        cls,
        params: Any,
        launcher: driver.Launcher,
        device: int,
        blocks_per_processor: int = 1,
        maps: SegmentMaps | None = None,
    ) -> Launch:
        """One that takes the work tiles of ``params.schedule``, with lists as long as ``params.lists`` says.

        Args:
            blocks_per_processor: thread blocks that a multiprocessor runs at a time.
        """
        blocks = persistent_blocks(device, params.schedule.num_work_tiles, blocks_per_processor)
        return cls(params, blocks, launcher, blocks * WORK_TILES * params.lists.length * KEY_TILE_BYTES, maps)

    def run_work_tiles(self, params: Any, q: Tensor, counter: int | None = None) -> None:
        """Launches with lists of their own, on the device of ``q``.

        Args:
            counter: address of 32 bits that are 0 when the kernel starts. None: it gets such.
        """
        lists = q.new_empty(self.list_bytes + COUNTER_BYTES, dtype=torch.uint8)
        params.lists.tiles = lists.data_ptr()
        if counter is None:
            counter = lists.data_ptr() + self.list_bytes
            driver.fill(q.get_device(), counter, 0)
        params.schedule.taken = counter
        self.launcher(self.blocks, params)


def persistent_blocks(device: int, items: int, blocks_per_processor: int = 1) -> int:
    """Thread blocks of a kernel that takes item after item: as many as the GPU runs at a time, each with an item."""
    return min(blocks_per_processor * torch.cuda.get_device_properties(device).multi_processor_count, items)


class SideView(NamedTuple):
    """The queries or the keys of a call as the kernels see them.

    Attributes:
        sizes: valid tokens of each block, or None.
        padded: TMA fills with zeros what is not valid, see ``view_of``.
    """

    problem: Problem
    side: Side
    sizes: SizesRef | None
    padded: bool

    @property
    def view(self) -> View:
        return view_of(self.side, padded=self.padded)

    def layout(self) -> Any:
        if self.side.segments is not None:
            return segment_layout(self.side)
        return token_layout(self.side, self.view, self.sizes)

    def tensor(
        self,
        tensor: TensorRef,
        dtype: torch.dtype,
        device: int,
        channels: int = PANEL_CHANNELS,
        swizzle: int = driver.SWIZZLE_128B,
    ) -> Any:
        """A tensor of these tokens as TMA reads it; that of segments has no maps yet.

        Args:
            channels, swizzle: of a box; if not given, those of the matrix units.
        """
        steps = head_steps(self.problem, self.side, tensor)
        if self.side.segments is not None:
            return structures(segments=True).TokenTensor(steps=steps, num_maps=len(self.side.segments.segments))
        encoded = token_map(self.problem, self.side, self.view, dtype, device, tensor, channels, swizzle)
        return structures(segments=False).TokenTensor(encoded, steps)


def maps_of(
    problem: Problem,
    tensors: Sequence[tuple[Side, TensorRef]],
    dtype: torch.dtype,
    device: int,
    channels: int = PANEL_CHANNELS,
    swizzle: int = driver.SWIZZLE_128B,
) -> SegmentMaps | None:
    """The launch that makes the maps of a call's tensors; None where the tokens are no segments."""
    if problem.queries.segments is None:
        return None
    return SegmentMaps.of(problem, tensors, dtype, device, channels, swizzle)


def tables_of(problem: Problem, like: Tensor) -> SegmentTables | None:
    """Where the tables of a call's segments are on the device of a tensor; None where the tokens are no segments."""
    segments = problem.queries.segments
    return None if segments is None else SegmentTables.of(segments, like.device)


def set_map(tables: SegmentTables | None, rows: Any, idx: Tensor, num: Tensor) -> None:
    """Says where the map is that a kernel reads, and with segments in which order it takes its rows."""
    rows.idx, rows.num = idx.data_ptr(), num.data_ptr()
    if tables is not None:
        rows.order, rows.columns = tables.order, tables.columns


def token_strides(strides: Sequence[int], side: Side) -> list[int]:
    """Of batches, heads and tokens."""
    return [strides[axis] for axis in axes(side.layout)[:3]]


def set_coarse(coarse: CoarseOutput, problem: Problem, operands: Operands) -> tuple[Tensor | None, Tensor | None]:
    """Says where the coarse output of a call and its gate are.

    Returns:
        Both as the kernel reads them: they must not be freed before the launch.
    """
    out_c, gate = operands.out_c, operands.gate
    if out_c is None:
        return None, None
    out_c = out_c.contiguous()
    coarse.out_c, coarse.gate_value = out_c.data_ptr(), operands.gate_value
    if gate is not None:
        gate = gate if gate.dtype in (operands.q.dtype, torch.float32) else gate.float()
        coarse.gate, coarse.gate_is_fp32 = gate.data_ptr(), gate.dtype == torch.float32
        coarse.gate_strides[:] = [gate.stride(axis) for axis in axes(problem.queries.layout)]
    return out_c, gate
