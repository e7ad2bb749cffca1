"""What a sweep runs: shapes, the cases on each shape, and the sizes that suit a device when none are given."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vsa_jit.backends.choose import Choice, choose
from vsa_jit.checks import check_problem, check_topk
from vsa_jit.problem import BackendName, Layout, Problem

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GATES = ("tensor", "one", "off")
DIRECTIONS = ("forward", "backward")

BlockSize = int | tuple[int, int, int]


@dataclass(frozen=True)
class Preset:
    """A shape that many people know. ``selected``: keys that a query attends unless the user says otherwise."""

    about: str
    seq_len: int
    grid: tuple[int, int, int] | None
    heads: int
    head_dim: int
    selected: int

    def __str__(self) -> str:
        return f"{self.about}, {self.heads} heads of {self.head_dim}, {self.selected} keys selected"


PRESETS = {
    "W1": Preset("Wan2.1-1.3B 480p, padded to whole blocks", 39_936, None, 12, 128, 4096),
    "W14": Preset("Wan2.1-14B 720p, padded to whole blocks", 92_160, None, 40, 128, 9216),
    "W1-raster": Preset("Wan2.1-1.3B 480p, its own 21x30x52 grid", 32_760, (21, 30, 52), 12, 128, 4096),
    "W14-raster": Preset("Wan2.1-14B 720p, its own 21x45x80 grid", 75_600, (21, 45, 80), 40, 128, 9216),
}


@dataclass(frozen=True)
class Recipe:
    """A choice of ``topk`` and block size for a purpose."""

    about: str
    topk: int
    block_size: BlockSize

    def __str__(self) -> str:
        return f"{self.about}, topk {self.topk} with block {format_size(self.block_size)}"


RECIPES = {
    "memory": Recipe("limited memory", 8, 64),
    "performance": Recipe("maximum performance", 16, (4, 8, 8)),
    "quality": Recipe("quality-critical", 32, (2, 8, 8)),
}


@dataclass(frozen=True)
class Defaults:
    """What is swept where the user says nothing; ``seconds`` go into each measurement."""

    seq_lens: tuple[int, ...]
    grids: tuple[tuple[int, int, int], ...]
    heads: int
    head_dim: int
    dtype: str
    seconds: float
    sparsities: tuple[float, ...] = (0.8, 0.9)
    block_sizes: tuple[BlockSize, ...] = (64, (4, 8, 8))

    def __str__(self) -> str:
        """The same as arguments of the command."""
        values = {
            "seq-len": self.seq_lens,
            "grid": map(format_size, self.grids),
            "sparsity": self.sparsities,
            "block-size": map(format_size, self.block_sizes),
            "heads": (self.heads,),
            "head-dim": (self.head_dim,),
            "dtype": (self.dtype,),
            "seconds": (self.seconds,),
        }
        return " ".join(f"--{flag} {' '.join(map(str, value))}" for flag, value in values.items())


DEFAULTS = {
    "cuda": Defaults((8192, 16_384, 39_936), ((21, 30, 52),), heads=12, head_dim=128, dtype="bf16", seconds=0.1),
    "cpu": Defaults((2048, 4096), ((7, 20, 24),), heads=2, head_dim=64, dtype="fp32", seconds=0.3),
}


@dataclass(frozen=True)
class Shape:
    """Everything that dense attention depends on: cases of one shape share inputs and the dense measurement."""

    seq_len: int
    grid: tuple[int, int, int] | None
    batch: int
    heads: int
    head_dim: int
    dtype: str
    layout: Layout

    @property
    def tokens(self) -> str:
        """The length or the grid, as the user wrote it."""
        return str(self.seq_len) if self.grid is None else format_size(self.grid)

    @property
    def size(self) -> tuple[int, int, int, int]:
        """Of q, in the order that the layout says."""
        if self.layout == "bhsd":
            return self.batch, self.heads, self.seq_len, self.head_dim
        return self.batch, self.seq_len, self.heads, self.head_dim

    @property
    def dense_flops(self) -> int:
        """Of dense attention's forward."""
        return 4 * self.batch * self.heads * self.seq_len**2 * self.head_dim


@dataclass(frozen=True)
class Selection:
    """How many key blocks each query block attends, as the user said it: by number or by the share left out."""

    topk: int | None = None
    sparsity: float | None = None

    def __str__(self) -> str:
        return f"topk {self.topk}" if self.sparsity is None else f"sparsity {self.sparsity:g}"


@dataclass(frozen=True)
class Case:
    """One call of ``video_sparse_attn`` to check and measure."""

    shape: Shape
    block_size: BlockSize
    selection: Selection
    gate: str
    backend: BackendName

    @functools.cached_property
    def problem(self) -> Problem:
        """The call's record. Raises like the call itself where an argument is wrong."""
        x = torch.empty(self.shape.size, dtype=DTYPES[self.shape.dtype], device="meta")
        return check_problem(
            x,
            x,
            x,
            block_size=self.block_size,
            grid=self.shape.grid,
            layout=self.shape.layout,
            softmax_scale=None,
            variable_block_sizes=None,
            q_variable_block_sizes=None,
        )

    @functools.cached_property
    def topk(self) -> int:
        """Key blocks that each query block attends."""
        return check_topk(self.selection.topk, self.selection.sparsity, self.problem.keys.num_blocks)

    @property
    def sparsity(self) -> float:
        """The share of key blocks that is left out in fact."""
        return 1.0 - self.topk / self.problem.keys.num_blocks

    @property
    def flops(self) -> int:
        """Of the fine branch's forward: 4·B·H·S·(topk·block)·D."""
        return self.shape.dense_flops // self.shape.seq_len * self.topk * self.problem.block

    def choice(self, device: torch.device) -> Choice:
        return choose(self.problem, self.backend, device, DTYPES[self.shape.dtype])

    def __str__(self) -> str:
        shape = self.shape
        return (
            f"{shape.tokens} tokens, B={shape.batch} H={shape.heads} D={shape.head_dim} {shape.dtype}, "
            f"block {format_size(self.block_size)}, topk {self.topk} of {self.problem.keys.num_blocks}"
        )


def flops_factor(direction: str) -> float:
    """Work of a direction, where that of the forward is 1."""
    return 1.0 if direction == "forward" else 2.5


def format_size(size: int | Sequence[int]) -> str:
    return str(size) if isinstance(size, int) else "x".join(map(str, size))


@dataclass(frozen=True)
class Inputs:
    """Fresh random normal tensors of one shape, all of q's size."""

    shape: Shape
    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor
    dout: Tensor

    @classmethod
    def random(cls, shape: Shape, device: torch.device, seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        q, k, v, gate, dout = (
            torch.randn(shape.size, generator=generator, dtype=DTYPES[shape.dtype], device=device) for _ in range(5)
        )
        return cls(shape, q, k, v, gate, dout)

    @property
    def device(self) -> torch.device:
        return self.q.device
