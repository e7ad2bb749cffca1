"""What launches of the attention kernels share: tensor maps of what they read, and the lists of their work tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vsa_jit.backends.sm90.layout import SizesRef, View, token_layout, view_of
from vsa_jit.backends.sm90.structs import KEY_TILE_BYTES, WORK_TILES, CoarseOutput, TokenLayout, TokenTensor
from vsa_jit.backends.sm90.tma import TensorRef, token_tensor
from vsa_jit.jit import driver
from vsa_jit.problem import Operands, Problem, Side, axes

LOG2E = math.log2(math.e)
# What TMA writes with a swizzle of 128 bytes: channels at a time.
PANEL_CHANNELS = 64
# The counter of work tiles lies behind the lists.
COUNTER_BYTES = 4


class Launch(NamedTuple):
    """All of a launch but the addresses that every call has anew."""

    params: Any
    blocks: int
    launcher: driver.Launcher
    list_bytes: int = 0

    @classmethod
    def of_work_tiles(
        cls, params: Any, launcher: driver.Launcher, device: int, blocks_per_processor: int = 1
    ) -> Launch:
        """One that takes the work tiles of ``params.schedule``, with lists as long as ``params.lists`` says.

        Args:
            blocks_per_processor: thread blocks that a multiprocessor runs at a time.
        """
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        blocks = min(blocks_per_processor * processors, params.schedule.num_work_tiles)
        return cls(params, blocks, launcher, blocks * WORK_TILES * params.lists.length * KEY_TILE_BYTES)

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

    def layout(self) -> TokenLayout:
        return token_layout(self.side, self.view, self.sizes)

    def tiles_of(self, tensor: TensorRef, dtype: torch.dtype, device: int) -> TokenTensor:
        """The tensor map of a tensor of these tokens, for boxes in the layout of the matrix units."""
        swizzle = driver.SWIZZLE_128B
        return token_tensor(self.problem, self.side, self.view, dtype, device, tensor, PANEL_CHANNELS, swizzle)


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
