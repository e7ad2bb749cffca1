"""What a sweep runs: shapes, the cases on each shape, and the sizes that suit a device when none are given."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from vsa_jit import flops
from vsa_jit.backends.choose import Choice, choose
from vsa_jit.checks import check_context, check_problem, check_topk_of_samples
from vsa_jit.problem import BackendName, Context, Layout, Problem

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GATES = ("tensor", "one", "off")
DIRECTIONS = ("forward", "backward")

BlockSize = int | tuple[int, int, int]
# The segments of each sample: plain tokens, or a video.
Samples: TypeAlias = tuple[tuple[int | tuple[int, int, int], ...], ...]


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
    segments: Samples | None = None

    @property
    def tokens(self) -> str:
        """The length, the grid or the segments, as the user wrote it."""
        if self.segments is not None:
            return format_samples(self.segments)
        return str(self.seq_len) if self.grid is None else format_size(self.grid)

    @property
    def order(self) -> dict[str, Any]:
        """The arguments of a call that say where its tokens are."""
        segments = None if self.segments is None else [list(sample) for sample in self.segments]
        return {"grid": self.grid, "segments": segments, "layout": self.layout}

    @property
    def sample_lengths(self) -> list[int]:
        """Tokens of each sample."""
        return [self.seq_len] if self.segments is None else sample_lengths(self.segments)

    @property
    def segment_lengths(self) -> list[int]:
        """Tokens of each segment."""
        if self.segments is None:
            return [self.seq_len]
        return [num_tokens(segment) for sample in self.segments for segment in sample]

    @property
    def size(self) -> tuple[int, int, int, int]:
        """Of q, in the order that the layout says."""
        if self.layout == "bhsd":
            return self.batch, self.heads, self.seq_len, self.head_dim
        return self.batch, self.seq_len, self.heads, self.head_dim

    @property
    def dense_pairs(self) -> int:
        """Queries, each as often as there are keys in its sample, of all heads."""
        return self.batch * self.heads * sum(length**2 for length in self.sample_lengths)

    @property
    def dense_flops(self) -> int:
        """Of dense attention's forward."""
        return 4 * self.dense_pairs * self.head_dim


@dataclass(frozen=True)
class Selection:
    """How many key blocks each query block attends, as the user said it: by number or by the share left out.

    With segments both count blocks of video, in each sample.
    """

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
    context: Context = "attend"

    @functools.cached_property
    def problem(self) -> Problem:
        """The call's record. Raises like the call itself where an argument is wrong."""
        x = torch.empty(self.shape.size, dtype=DTYPES[self.shape.dtype], device="meta")
        return check_problem(
            x,
            x,
            x,
            block_size=self.block_size,
            **self.shape.order,
            softmax_scale=None,
            variable_block_sizes=None,
            q_variable_block_sizes=None,
        )

    @functools.cached_property
    def topk_of_samples(self) -> list[int]:
        """Key blocks that each query block attends; with segments of video, in each sample."""
        segments = self.shape.order["segments"]
        return check_topk_of_samples(self.selection.topk, self.selection.sparsity, segments, self.problem.keys)

    @property
    def topk(self) -> int:
        """Of the sample where it is most."""
        return max(self.topk_of_samples)

    @property
    def blocks_of_samples(self) -> list[int]:
        """Those that each query block chooses among."""
        segments = self.problem.keys.segments
        if segments is None:
            return [self.problem.keys.num_blocks]
        return [sample.num_video_blocks for sample in segments.samples]

    @property
    def selected(self) -> str:
        """How many of how many key blocks each query block attends, in each sample, such as 6/60,3/30."""
        counts = zip(self.topk_of_samples, self.blocks_of_samples, strict=True)
        return ",".join(f"{topk}/{most}" for topk, most in counts)

    @property
    def sparsity(self) -> float:
        """The share of key blocks that is left out in fact; with segments of those of video, by queries of video."""
        # A sample without a video leaves nothing out.
        return 1.0 - sum(self.topk_of_samples) / most if (most := sum(self.blocks_of_samples)) else 0.0

    @property
    def compete(self) -> bool:
        return check_context(self.context, self.shape.order["segments"])

    def same_sample(self, device: torch.device) -> Tensor:
        """Which block is of the same sample as which: bool [n, n]."""
        blocks = torch.zeros(self.problem.keys.num_blocks, dtype=torch.int32)
        if self.problem.keys.segments is not None:
            for sample in self.problem.keys.segments.samples:
                blocks[sample.first_block : sample.first_block + sample.num_blocks] = sample.number
        return (blocks[:, None] == blocks).to(device)

    @property
    def flops(self) -> int:
        """Of the fine branch's forward where each query attends ``topk`` whole blocks: 4·B·H·S·(topk·block)·D."""
        return self.shape.dense_flops // self.shape.seq_len * self.topk * self.problem.block

    def flops_of(self, q2k_idx: Tensor, q2k_num: Tensor) -> int:
        """The same of what was selected. With segments, 4·D for each query and key that it attends, context too."""
        if self.shape.segments is None:
            return self.flops
        return 4 * self.shape.head_dim * flops.pairs(self.problem, q2k_idx, q2k_num, None, None)

    def choice(self, device: torch.device) -> Choice:
        return choose(self.problem, self.backend, device, DTYPES[self.shape.dtype])

    def __str__(self) -> str:
        shape = self.shape
        return (
            f"{shape.tokens} tokens, B={shape.batch} H={shape.heads} D={shape.head_dim} {shape.dtype}, "
            f"block {format_size(self.block_size)}, topk {self.selected}"
        )


def flops_factor(direction: str) -> float:
    """Work of a direction, where that of the forward is 1."""
    return 1.0 if direction == "forward" else 2.5


def format_size(size: int | Sequence[int]) -> str:
    return str(size) if isinstance(size, int) else "x".join(map(str, size))


def format_samples(samples: Samples) -> str:
    return ",".join("+".join(map(format_size, sample)) for sample in samples)


def num_tokens(size: int | tuple[int, int, int]) -> int:
    return size if isinstance(size, int) else math.prod(size)


def sample_lengths(samples: Samples) -> list[int]:
    """Tokens of each sample."""
    return [sum(map(num_tokens, sample)) for sample in samples]


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
