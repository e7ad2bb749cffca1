"""Tile sizes, warps and pipeline stages, chosen so that shared memory and registers of the device hold them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# Accumulators that a thread may keep before the rest of its registers runs short.
MAX_ACCUMULATORS = 192
# What a kernel needs in shared memory besides its tiles: barriers, reductions, rows of statistics.
SHARED_MEMORY_RESERVE = 1024


@dataclass(frozen=True)
class Architecture:
    """What the choice of tiles depends on: bytes of shared memory for a thread block, and whether ``wgmma`` exists."""

    shared_memory: int
    wgmma: bool


@dataclass(frozen=True)
class Config:
    """``rows`` query rows against ``columns`` key rows at a time."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int

    @property
    def launch(self) -> dict[str, int]:
        # Multiply-adds are counted on: without them the exponentials of a tile cost one more instruction each.
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return {"BLOCK_M": self.rows, "BLOCK_N": self.columns, **options}


# Best first. Those for wgmma were measured on an H200, the others compiled and chosen by their registers; the first
# that fits is taken, and the last of each list fits the smallest GPU with the largest head.
_FORWARD_WGMMA = (Config(128, 128, 8, 3), Config(128, 64, 8, 2), Config(64, 64, 4, 2), Config(64, 32, 4, 2))
_FORWARD_MMA = (Config(128, 64, 8, 2), Config(64, 64, 4, 2), Config(64, 32, 4, 2), Config(64, 16, 4, 2))
_BACKWARD_Q_WGMMA = (Config(128, 128, 8, 2), Config(128, 64, 8, 2), Config(64, 64, 4, 2), Config(64, 32, 4, 2))
_BACKWARD_Q_MMA = (Config(64, 64, 4, 2), Config(64, 32, 4, 2), Config(64, 16, 4, 2))
# With dk and dv to accumulate, 128 key rows run short of registers: on sequences 64 are faster at every block size. In
# raster order, where each step has more to do beside its products, half as many steps are worth more if rows are wide.
# A border's masks take still more registers: blocks of 64 then do better with fewer query rows, 128 with three stages.
_BACKWARD_KV_WGMMA = (Config(64, 64, 4, 2), Config(32, 64, 8, 2))
_BACKWARD_KV_WGMMA_RASTER = (Config(64, 128, 8, 2), *_BACKWARD_KV_WGMMA)
_BACKWARD_KV_WGMMA_BORDER = (Config(64, 128, 8, 3), Config(32, 64, 4, 2), Config(32, 64, 8, 2))
_BACKWARD_KV_MMA = (Config(32, 64, 4, 2), Config(32, 64, 8, 2), Config(16, 64, 8, 2))
# Of products of block means, measured on an H200: where the right factor is contiguous along the sum, and elsewhere.
_MATMUL_ALONG_SUM = (Config(64, 64, 4, 3), 32)
_MATMUL = (Config(128, 32, 4, 3), 16)
_FP32 = (Config(32, 32, 4, 2), Config(32, 16, 4, 2), Config(16, 16, 4, 2))


@functools.cache
def architecture(device: torch.device) -> Architecture:
    """The device's; for the interpreter, which has none, a small one."""
    if device.type != "cuda":
        return Architecture(shared_memory=101376, wgmma=False)
    properties: Any = torch.cuda.get_device_properties(device)
    return Architecture(properties.shared_memory_per_block_optin, wgmma=properties.major == 9)


@functools.cache
def forward(block: int, head_dim: int, itemsize: int, arch: Architecture) -> Config:
    candidates = _FP32 if itemsize == 4 else _FORWARD_WGMMA if arch.wgmma else _FORWARD_MMA
    fit = _Fit(block, head_dim, itemsize, arch)
    return fit.first(candidates, lambda c: (c.rows, 4 * c.columns), lambda c: c.rows * (fit.width + c.columns))


@functools.cache
def backward_q(block: int, head_dim: int, itemsize: int, arch: Architecture) -> Config:
    candidates = _FP32 if itemsize == 4 else _BACKWARD_Q_WGMMA if arch.wgmma else _BACKWARD_Q_MMA
    fit = _Fit(block, head_dim, itemsize, arch)
    return fit.first(candidates, lambda c: (2 * c.rows, 4 * c.columns), lambda c: c.rows * (fit.width + 2 * c.columns))


@functools.cache
def backward_kv(block: int, head_dim: int, itemsize: int, arch: Architecture, raster: bool, border: bool) -> Config:
    """``raster`` says in which order the tokens are, ``border`` that the border of the video cuts some blocks."""
    wgmma: tuple[Config, ...] = _BACKWARD_KV_WGMMA
    if raster and head_dim > 64:
        wgmma = _BACKWARD_KV_WGMMA_BORDER if border else _BACKWARD_KV_WGMMA_RASTER
    candidates = _FP32 if itemsize == 4 else wgmma if arch.wgmma else _BACKWARD_KV_MMA
    fit = _Fit(block, head_dim, itemsize, arch)
    return fit.first(candidates, lambda c: (2 * c.columns, 4 * c.rows), lambda c: 2 * c.columns * (fit.width + c.rows))


def matmul(along_sum: bool) -> tuple[Config, int]:
    """Tiles of the result, and how much of the sum is added at a time.

    Args:
        along_sum: whether the right factor is contiguous along the sum.
    """
    return _MATMUL_ALONG_SUM if along_sum else _MATMUL


class _Fit:
    """Whether a kernel with some tiles fits: rows of the head's width in shared memory, accumulators in registers.

    A tile that stays counts once for each tensor, one that streams twice. With three stages and the masks of a raster's
    border Triton keeps a third in flight, for which the GPUs with wgmma have room: the tests compile it.
    """

    def __init__(self, block: int, head_dim: int, itemsize: int, arch: Architecture) -> None:
        self.block = block
        self.width = 1 << (head_dim - 1).bit_length()
        self.row_bytes = self.width * itemsize
        self.arch = arch

    def first(
        self,
        candidates: tuple[Config, ...],
        shared_rows: Callable[[Config], tuple[int, int]],
        accumulators: Callable[[Config], int],
    ) -> Config:
        for config in candidates:
            divides = self.block % config.rows == 0 and self.block % config.columns == 0
            shared = sum(shared_rows(config)) * self.row_bytes + SHARED_MEMORY_RESERVE
            registers = accumulators(config) // (32 * config.num_warps)
            if divides and shared <= self.arch.shared_memory and registers <= MAX_ACCUMULATORS:
                return config
        raise NotImplementedError(f"no tiles for blocks of {self.block}, rows of {self.row_bytes} bytes on {self.arch}")
