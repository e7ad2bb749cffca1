"""What a call says, as one frozen record, and the checks that make everything below trust it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

LAYOUTS = ("bhsd", "bshd")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MIN_HEAD_DIM = 16
MAX_HEAD_DIM = 256
# Kernels take numbers in fp32, and the softmax scale multiplied by log2(e).
LARGEST_FLOAT = torch.finfo(torch.float32).max
SCALES = torch.finfo(torch.float32).tiny, LARGEST_FLOAT * math.log(2)
TILE_OF_TOKENS = {64: (4, 4, 4), 128: (2, 8, 8), 256: (4, 8, 8)}


class Problem(NamedTuple):
    """Shapes and settings of one call, independent of which order its tokens are in.

    A tuple: what depends on the call is kept under it, and looked up at every call. ``tile`` is the block as a video
    tile ``(t, h, w)``; without a ``grid`` only its product counts, and blocks are runs of consecutive tokens: the last
    one partial, or each one's valid tokens counted by a tensor of block sizes.
    """

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    tile: tuple[int, int, int]
    grid: tuple[int, int, int] | None
    layout: str
    softmax_scale: float
    backend: str

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        tile: Sequence[int],
        grid: Sequence[int] | None,
        layout: str,
        softmax_scale: float,
        backend: str,
    ) -> Problem:
        """The record of a call whose arguments were checked already."""
        batch, heads, q_len, head_dim = _shape(q, layout)
        _, kv_heads, kv_len, _ = _shape(k, layout)
        tile = (tile[0], tile[1], tile[2])
        grid = None if grid is None else (grid[0], grid[1], grid[2])
        return cls(batch, heads, kv_heads, q_len, kv_len, head_dim, tile, grid, layout, softmax_scale, backend)

    @property
    def block(self) -> int:
        """Tokens of a full block."""
        return math.prod(self.tile)

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads

    @property
    def num_q_blocks(self) -> int:
        return self.num_blocks(self.q_len)

    @property
    def num_kv_blocks(self) -> int:
        return self.num_blocks(self.kv_len)

    def num_blocks(self, length: int) -> int:
        """Blocks of a sequence of this length (of queries or of keys)."""
        if self.grid is None:
            return -(-length // self.block)
        return math.prod([-(-extent // side) for extent, side in zip(self.grid, self.tile, strict=True)])

    def is_partial(self, length: int) -> bool:
        """Whether some block is cut by the end of a sequence of this length, or by the border of the video."""
        if self.grid is None:
            return length % self.block != 0
        return any([extent % side != 0 for extent, side in zip(self.grid, self.tile, strict=True)])

    @property
    def static(self) -> tuple[list[int], list[int] | None, str, float, str]:
        """What an operator is told besides its tensors; ``of`` reads it back."""
        grid = None if self.grid is None else list(self.grid)
        return list(self.tile), grid, self.layout, self.softmax_scale, self.backend


class Operands(NamedTuple):
    """What the fine branch attends, and the coarse output that it adds; shapes as in ``vsa_jit.ops.attend``."""

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


def _shape(x: Tensor, layout: str) -> tuple[int, int, int, int]:
    """Batch, heads, length and head dimension."""
    batch, heads, length, head_dim = x.shape
    return (batch, heads, length, head_dim) if layout == "bhsd" else (batch, length, heads, head_dim)


def empty_like(x: Tensor) -> Tensor:
    """Uninitialised, in the memory order of ``x``, but always with a contiguous last dimension."""
    empty = torch.empty_like(x)
    return empty if empty.stride(-1) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)


def bhsd(x: Tensor, layout: str) -> Tensor:
    """The tensor as a [B, H, S, D] view."""
    return x if layout == "bhsd" else x.transpose(1, 2)


def check_problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int | Sequence[int],
    grid: Sequence[int] | None,
    layout: str,
    softmax_scale: float | None,
    backend: str,
    variable_block_sizes: Tensor | None,
    q_variable_block_sizes: Tensor | None,
) -> Problem:
    """Checks the arguments that every function takes and gives the record of the call.

    Raises:
        TypeError: an argument is of the wrong kind or dtype.
        ValueError: an argument has a wrong value, shape, layout or device.
    """
    if not isinstance(layout, str):
        raise TypeError(f"layout: expected a string, got {type(layout).__name__}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {LAYOUTS}, got {layout!r}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_input(name, x, layout)
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected q's device {q.device}, got {x.device}")
    if v.shape != k.shape:
        raise ValueError(f"v: expected k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    batch, heads, q_len, head_dim = _shape(q, layout)
    kv_batch, kv_heads, kv_len, kv_head_dim = _shape(k, layout)
    if kv_batch != batch:
        raise ValueError(f"k: expected q's batch size {batch}, got {kv_batch}")
    if kv_head_dim != head_dim:
        raise ValueError(f"k: expected q's head dimension {head_dim}, got {kv_head_dim}")
    if heads % kv_heads != 0:
        raise ValueError(f"q: expected a number of heads that is a multiple of k's {kv_heads}, got {heads}")
    if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"q: expected a head dimension from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, got {head_dim}")
    if softmax_scale is None:
        softmax_scale = head_dim**-0.5
    elif isinstance(softmax_scale, bool) or not isinstance(softmax_scale, (int, float)):
        raise TypeError(f"softmax_scale: expected a number or None, got {type(softmax_scale).__name__}")
    elif not SCALES[0] <= softmax_scale <= SCALES[1]:
        raise ValueError(
            f"softmax_scale: expected a number from {SCALES[0]:.3g} to {SCALES[1]:.3g}, got {softmax_scale}"
        )

    tile = check_block_size(block_size, with_grid=grid is not None)
    if grid is not None:
        grid = _check_triple("grid", grid)
        for name, given in (
            ("variable_block_sizes", variable_block_sizes),
            ("q_variable_block_sizes", q_variable_block_sizes),
        ):
            if given is not None:
                raise ValueError(f"{name}: expected None where grid is given (the grid says which tokens are valid)")
        for name, length in (("q", q_len), ("k", kv_len)):
            if length != math.prod(grid):
                raise ValueError(
                    f"grid: expected T·H·W to be {name}'s sequence length {length}, got {grid} with {math.prod(grid)}"
                )
    scale = float(softmax_scale)
    problem = Problem(batch, heads, kv_heads, q_len, kv_len, head_dim, tile, grid, layout, scale, backend)
    for name, sizes, length in (
        ("variable_block_sizes", variable_block_sizes, kv_len),
        ("q_variable_block_sizes", q_variable_block_sizes, q_len),
    ):
        if sizes is not None:
            _check_sizes(name, sizes, length, problem, q.device)
    return problem


def check_topk(topk: int | None, sparsity: float | None, num_kv_blocks: int) -> int:
    """Key blocks to keep for each query block, from exactly one of ``topk`` and ``sparsity``: 1 … num_kv_blocks."""
    if (topk is None) == (sparsity is None):
        both = "both" if topk is not None else "neither"
        raise ValueError(f"topk, sparsity: expected exactly one of them, got {both}")
    if topk is not None:
        if isinstance(topk, bool) or not isinstance(topk, int):
            raise TypeError(f"topk: expected an int, got {type(topk).__name__}")
        if topk < 1:
            raise ValueError(f"topk: expected at least 1, got {topk}")
        return min(topk, num_kv_blocks)
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)):
        raise TypeError(f"sparsity: expected a float, got {type(sparsity).__name__}")
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity: expected a number in [0, 1), got {sparsity}")
    # 1 - 0.7 is a little above 0.3 in floating point: 3.0000000000000004 of 10 blocks are 3, not 4.
    return max(1, min(math.ceil(round((1.0 - sparsity) * num_kv_blocks, 6)), num_kv_blocks))


def check_gate(gate: Tensor | float | None, q: Tensor) -> Tensor | float:
    """The gate as a float or as a tensor of q's shape (a view where it was broadcast)."""
    if gate is None:
        return 1.0
    if isinstance(gate, Tensor):
        _check_tensor("compress_attn_weight", gate, (*DTYPES, torch.float64), q.device)
        missing = q.dim() - gate.dim()
        sizes = zip(gate.shape, q.shape[max(missing, 0) :], strict=False)
        if missing < 0 or any(size not in (1, full) for size, full in sizes):
            raise ValueError(
                f"compress_attn_weight: expected q's shape {tuple(q.shape)} or one that broadcasts to it, "
                f"got {tuple(gate.shape)}"
            )
        return gate.expand(q.shape)
    if isinstance(gate, bool) or not isinstance(gate, (int, float)):
        raise TypeError(f"compress_attn_weight: expected a tensor, a float or None, got {type(gate).__name__}")
    if not -LARGEST_FLOAT <= gate <= LARGEST_FLOAT:
        raise ValueError(f"compress_attn_weight: expected a finite number, got {gate}")
    return float(gate)


def check_block_map(block_map: Tensor, problem: Problem, device: torch.device) -> Tensor:
    """The map as bool [B, H, n_q, n_k]."""
    _check_tensor("block_map", block_map, (torch.bool,), device)
    full = (problem.batch, problem.heads, problem.num_q_blocks, problem.num_kv_blocks)
    if tuple(block_map.shape) not in (full, full[1:]):
        raise ValueError(f"block_map: expected shape {full} or {full[1:]}, got {tuple(block_map.shape)}")
    return block_map.expand(full)


def check_indices(q2k_idx: Tensor, q2k_num: Tensor, problem: Problem, device: torch.device) -> None:
    _check_tensor("q2k_idx", q2k_idx, (torch.int32,), device)
    _check_tensor("q2k_num", q2k_num, (torch.int32,), device)
    rows = (problem.batch, problem.heads, problem.num_q_blocks)
    if q2k_idx.dim() != 4 or tuple(q2k_idx.shape[:3]) != rows:
        expected = f"({', '.join(map(str, rows))}, m)"
        raise ValueError(f"q2k_idx: expected shape {expected} for any m, got {tuple(q2k_idx.shape)}")
    if tuple(q2k_num.shape) != rows:
        raise ValueError(f"q2k_num: expected shape {rows}, got {tuple(q2k_num.shape)}")


def _check_tensor(name: str, x: Any, dtypes: tuple[torch.dtype, ...], device: torch.device | None) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.layout != torch.strided or x.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got a nested one or one of layout {x.layout}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {' or '.join(map(str, dtypes))}, got {x.dtype}")
    if device is not None and x.device != device:
        raise ValueError(f"{name}: expected q's device {device}, got {x.device}")


def _check_input(name: str, x: Any, layout: str) -> None:
    _check_tensor(name, x, DTYPES, None)
    if x.dim() != 4:
        raise ValueError(f"{name}: expected 4 dimensions ({layout}), got shape {tuple(x.shape)}")
    if 0 in x.shape:
        raise ValueError(f"{name}: expected no empty dimension, got shape {tuple(x.shape)}")
    if x.stride(-1) != 1:
        raise ValueError(
            f"{name}: expected a contiguous last dimension (stride 1), got stride {x.stride(-1)}; "
            "call .contiguous() on it"
        )


def _check_triple(name: str, value: Sequence[int]) -> tuple[int, int, int]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(f"{name}: expected three ints, got {type(value).__name__}")
    if len(value) != 3:
        raise ValueError(f"{name}: expected three ints, got {len(value)}: {tuple(value)}")
    for size in value:
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name}: expected three ints, got {type(size).__name__} in {tuple(value)}")
    if any(size < 1 for size in value):
        raise ValueError(f"{name}: expected three positive ints, got {tuple(value)}")
    return value[0], value[1], value[2]


def check_block_size(block_size: int | Sequence[int], *, with_grid: bool) -> tuple[int, int, int]:
    if isinstance(block_size, bool):
        raise TypeError("block_size: expected an int or three ints (t, h, w), got bool")
    if not isinstance(block_size, int):
        tile = _check_triple("block_size", block_size)
    elif with_grid:
        if block_size not in TILE_OF_TOKENS:
            raise ValueError(
                f"block_size: expected a tile (t, h, w) or one of {tuple(TILE_OF_TOKENS)} where grid is given, "
                f"got {block_size}"
            )
        tile = TILE_OF_TOKENS[block_size]
    else:
        tile = (1, 1, block_size)
    tokens = math.prod(tile)
    if tokens < 64 or tokens % 64 != 0:
        raise ValueError(f"block_size: expected a positive multiple of 64 tokens, got {block_size} with {tokens}")
    return tile


def _check_sizes(name: str, sizes: Tensor, length: int, problem: Problem, device: torch.device) -> None:
    _check_tensor(name, sizes, (torch.int32, torch.int64), device)
    block, num_blocks = problem.block, problem.num_blocks(length)
    if length % block != 0:
        raise ValueError(
            f"{name}: expected a sequence of whole blocks of {block} tokens (padded to full size), got length {length}"
        )
    if sizes.dim() != 1 or sizes.shape[0] != num_blocks:
        raise ValueError(f"{name}: expected shape ({num_blocks},), one size for each block, got {tuple(sizes.shape)}")
