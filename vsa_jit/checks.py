"""The checks of arguments, at the public edge, that make everything below trust a call.

Shapes may be symbolic, of a program that ``torch.compile`` or ``torch.export`` traces: they are compared size by size.
"""

from __future__ import annotations

import functools
import math
import numbers
import operator
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, cast, get_args

import torch
from torch import Tensor

from vsa_jit import symbolic
from vsa_jit.fastpath import plain_key, value_of_key
from vsa_jit.problem import TILE_OF_TOKENS, Context, Layout, Problem, Side, sizes_of
from vsa_jit.segments import Order, Segments, order_of
from vsa_jit.text import counted

LAYOUTS = get_args(Layout)
CONTEXTS = get_args(Context)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INDEX_DTYPES = (torch.int32, torch.int64)
MIN_HEAD_DIM = 16
MAX_HEAD_DIM = 256
# Kernels take numbers in fp32, and the softmax scale multiplied by log2(e).
LARGEST_FLOAT = torch.finfo(torch.float32).max
SCALES = torch.finfo(torch.float32).tiny, LARGEST_FLOAT * math.log(2)
# 1 - 0.7 is a little above 0.3 in floating point: 3.0000000000000004 of 10 blocks are 3, not 4.
ROUNDING = 5e-7
# Shares above 1 that are more likely to be meant in percent than to be slips.
PERCENT = 10.0, 100.0
# Far beyond any sequence, and small enough for every product of sizes.
LARGEST_BLOCK = 1 << 24
# The longest side of a cube of tokens that an int may have been meant for.
LONGEST_CUBE = 16


def check_problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int | Sequence[int],
    grid: Sequence[int] | None,
    layout: str,
    softmax_scale: float | None,
    variable_block_sizes: Tensor | None,
    q_variable_block_sizes: Tensor | None,
    segments: Sequence[Any] | None = None,
) -> Problem:
    """Checks the arguments that every function takes and gives the record of the call.

    Raises:
        TypeError: an argument is of the wrong kind or dtype.
        ValueError: an argument has a wrong value, shape, layout or device.
    """
    check_choice("layout", layout, LAYOUTS)
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_input(name, x, layout)
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected q's device {q.device}, got {x.device}")
    if not _same_shape(v.shape, k.shape):
        raise ValueError(f"v: expected k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    batch, heads, q_len, head_dim = sizes_of(q, layout)
    kv_batch, kv_heads, kv_len, kv_head_dim = sizes_of(k, layout)
    if kv_batch != batch:
        raise ValueError(f"k: expected q's batch size {batch}, got {kv_batch}")
    if kv_head_dim != head_dim:
        raise ValueError(f"k: expected q's head dimension {head_dim}, got {kv_head_dim}")
    if heads % kv_heads != 0:
        raise ValueError(f"q: expected a number of heads that is a multiple of k's {kv_heads}, got {heads}")
    if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"q: expected a head dimension from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, got {head_dim}")
    if softmax_scale is None:
        scale = head_dim**-0.5
    else:
        scale = check_number("softmax_scale", softmax_scale, "a number or None")
        if not SCALES[0] <= scale <= SCALES[1]:
            raise ValueError(f"softmax_scale: expected a number from {SCALES[0]:.3g} to {SCALES[1]:.3g}, got {scale}")

    in_raster_order = grid is not None or segments is not None
    tile = check_block_size(block_size, with_grid=in_raster_order)
    order = _check_order(grid, segments, tile, q_len, kv_len)
    if in_raster_order:
        what = "grid" if segments is None else "segments"
        for name, given in (
            ("variable_block_sizes", variable_block_sizes),
            ("q_variable_block_sizes", q_variable_block_sizes),
        ):
            if given is not None:
                raise ValueError(
                    f"{name}: expected None where {what} {'is' if segments is None else 'are'} given "
                    f"(the {what} {'says' if segments is None else 'say'} which tokens are valid)"
                )
    queries, keys = (
        Side(heads, length, tile, order.grid, layout, order.segments)
        for heads, length in ((heads, q_len), (kv_heads, kv_len))
    )
    problem = Problem(batch, head_dim, queries, keys, float(scale))
    for name, sizes, side in (
        ("variable_block_sizes", variable_block_sizes, keys),
        ("q_variable_block_sizes", q_variable_block_sizes, queries),
    ):
        if sizes is not None:
            _check_sizes(name, sizes, side, q.device)
    if not torch.compiler.is_compiling():
        warn_of_layout(problem, stacklevel=5)
    return problem


def _check_order(
    grid: Sequence[int] | None,
    segments: Sequence[Any] | None,
    tile: tuple[int, int, int],
    q_len: int,
    kv_len: int,
) -> Order:
    """The order that the grid or the segments describe, which have as many tokens as the queries and the keys."""
    if segments is None:
        if grid is None:
            return Order(None, None)
        video = _check_triple("grid", grid)
        for name, length in (("q", q_len), ("k", kv_len)):
            if length != math.prod(video):
                raise ValueError(
                    f"grid: expected T·H·W to be {name}'s sequence length {length}, got {video} with {math.prod(video)}"
                )
        return Order(video, None)
    if grid is not None:
        raise ValueError("grid, segments: expected at most one of them, got both")
    order, total = order_of_list(segments, tile)
    for name, length in (("q", q_len), ("k", kv_len)):
        if length != total:
            packed = "; a list of lists is several samples, and a video is a tuple (T, H, W)"
            raise ValueError(
                f"segments: expected lengths that add up to {name}'s sequence length {length}, got {total}"
                f"{packed if is_packed(segments) else ''}"
            )
    return order


def order_of_list(segments: Sequence[Any], tile: tuple[int, int, int]) -> tuple[Order, int]:
    """The order that segments describe, and how many tokens they have. A list seen before is not read again."""
    key = plain_key(segments)
    if key is not None:
        # What is wrong is said of the list itself, and NumPy's numbers are something else as bytes.
        with suppress(TypeError, ValueError):
            return _order_of_known(key, tile)
    return _order_of_list(segments, tile)


def _order_of_list(segments: Sequence[Any], tile: tuple[int, int, int]) -> tuple[Order, int]:
    numbers = _check_segments(segments)
    total = sum(t * h * w if t != 0 else w for _, (t, h, w) in numbers)
    return order_of([number for sample, extents in numbers for number in (sample, *extents)], tile), total


@functools.lru_cache(maxsize=1024)
def _order_of_known(key: bytes, tile: tuple[int, int, int]) -> tuple[Order, int]:
    return _order_of_list(value_of_key(key), tile)


def _check_segments(segments: Sequence[Any]) -> list[tuple[int, tuple[int, int, int]]]:
    """Of each segment that has tokens its sample, and (T, H, W) of a video or (0, 0, length) of plain tokens."""
    numbers = []
    for sample, of_sample in enumerate(_samples_of(segments)):
        for segment in of_sample:
            t, h, w = _check_segment(segment)
            if (t * h * w if _is_sequence(segment) else w) != 0:
                numbers.append((sample, (t, h, w)))
    return numbers


def _samples_of(segments: Sequence[Any]) -> Sequence[Any]:
    """The segments of each sample, as they were given."""
    if not _is_sequence(segments):
        raise TypeError(f"segments: expected a list of lengths and grids (T, H, W), got {type(segments).__name__}")
    return segments if is_packed(segments) else [segments]


def is_packed(segments: Sequence[Any]) -> bool:
    """Whether segments are those of several samples: a list of lists. A video is a tuple, or a list beside a length."""
    return len(segments) > 0 and all([_is_sequence(entry) and not isinstance(entry, tuple) for entry in segments])


def _check_segment(segment: Any) -> tuple[int, int, int]:
    expected = "a number of tokens or a grid (T, H, W) for each segment"
    if _is_sequence(segment):
        if len(segment) != 3 or any([_is_sequence(size) for size in segment]):
            raise ValueError(f"segments: expected {expected}, got {segment!r}")
        t, h, w = (check_int("segments", size, expected) for size in segment)
        if t < 0 or h < 0 or w < 0:
            raise ValueError(f"segments: expected no negative size, got {(t, h, w)}")
        return t, h, w
    length = check_int("segments", segment, expected)
    if length < 0:
        raise ValueError(f"segments: expected no negative length, got {length}")
    return 0, 0, length


def warn_of_layout(problem: Problem, stacklevel: int) -> None:
    """Warns where heads and tokens seem to have changed places: fewer tokens than a block, and more heads than tokens.

    Where sizes are symbolic nothing is said, since asking would fix them.
    """
    for name, side in (("q", problem.queries), ("k", problem.keys)):
        heads, length = side.heads, side.length
        known = isinstance(heads, int) and isinstance(length, int)
        if known and problem.batch != 0 and length < side.block and length < heads:
            other = "bshd" if side.layout == "bhsd" else "bhsd"
            warnings.warn(
                f"vsa_jit: layout={side.layout!r} makes {name} {counted(heads, 'head')} of "
                f"{counted(length, 'token')}; pass layout={other!r} if it is {counted(length, 'head')} of "
                f"{counted(heads, 'token')}",
                stacklevel=stacklevel,
            )
            return


def check_topk(topk: int | None, sparsity: float | None, num_kv_blocks: int) -> int:
    """Key blocks to keep for each query block, from exactly one of ``topk`` and ``sparsity``: 1 … num_kv_blocks."""
    _check_one_of(topk, sparsity)
    if topk is not None:
        topk = check_int("topk", topk)
        if topk < 1:
            raise ValueError(f"topk: expected at least 1, got {topk}")
        return min(topk, num_kv_blocks)
    sparsity = check_number("sparsity", sparsity, "a float")
    check_sparsity(sparsity, "sparsity: ", sparsity)
    if symbolic.is_symbolic(sparsity) or symbolic.is_symbolic(num_kv_blocks):
        kept = (1.0 - symbolic.as_tensor(sparsity)) * num_kv_blocks
        return symbolic.as_int((kept - ROUNDING).ceil(), 1, num_kv_blocks)
    return max(1, min(math.ceil((1.0 - sparsity) * num_kv_blocks - ROUNDING), num_kv_blocks))


def check_topk_of_samples(
    topk: int | Sequence[int] | None,
    sparsity: float | Sequence[float] | None,
    segments: Sequence[Any] | None,
    keys: Side,
) -> list[int]:
    """``check_topk`` of every sample that has tokens: how many of its video's key blocks to keep, 0 where it has none.

    Args:
        topk, sparsity: for all samples, or a list with one for each of ``segments``, those without tokens too.
        keys: whose order ``segments`` have become. Without segments there is one sample, of all key blocks.
    """
    if segments is None:
        return [check_topk(topk, sparsity, keys.num_blocks)]  # type: ignore[arg-type]
    key = plain_key((topk, sparsity, segments))
    if key is not None:
        with suppress(TypeError, ValueError):
            return list(_topk_of_known(key, keys.segments, keys.num_blocks))
    return _topk_of_samples(topk, sparsity, segments, keys.segments, keys.num_blocks)


@functools.lru_cache(maxsize=1024)
def _topk_of_known(key: bytes, of_keys: Segments | None, num_kv_blocks: int) -> list[int]:
    topk, sparsity, segments = value_of_key(key)
    return _topk_of_samples(topk, sparsity, segments, of_keys, num_kv_blocks)


def _topk_of_samples(
    topk: int | Sequence[int] | None,
    sparsity: float | Sequence[float] | None,
    segments: Sequence[Any],
    of_keys: Segments | None,
    num_kv_blocks: int,
) -> list[int]:
    num_samples = len(_samples_of(segments))
    _check_one_of(topk, sparsity)
    of_samples: list[list[Any]] = []
    for name, values in (("topk", topk), ("sparsity", sparsity)):
        if _is_sequence(values):
            if len(values) != num_samples:  # type: ignore[arg-type]
                raise ValueError(
                    f"{name}: expected one value, or a list of {num_samples}, one for each sample of segments, "
                    f"got {len(values)}"  # type: ignore[arg-type]
                )
            of_samples.append(list(values))  # type: ignore[arg-type]
        else:
            of_samples.append([values] * num_samples)
    for number in range(num_samples):
        check_topk(of_samples[0][number], of_samples[1][number], 1)
    if of_keys is None:
        # All tokens are those of one video.
        samples = [(_check_segments(segments)[0][0], num_kv_blocks)]
    else:
        samples = [(sample.number, sample.num_video_blocks) for sample in of_keys.samples]
    return [
        check_topk(of_samples[0][number], of_samples[1][number], most) if most != 0 else 0 for number, most in samples
    ]


def check_context(context: str, segments: Sequence[Any] | None) -> bool:
    """Whether the key blocks of context compete with those of the video for a place."""
    return check_choice("context", context, CONTEXTS) == "compete" and segments is not None


def check_several_topk(
    topk: Sequence[Any] | None, sparsity: Sequence[Any] | None, segments: Sequence[Any] | None, keys: Side
) -> list[list[int]]:
    """``check_topk_of_samples`` of each of several values."""
    _check_one_of(topk, sparsity)
    name, values = ("topk", topk) if sparsity is None else ("sparsity", sparsity)
    _check_several(name, values)
    return [
        check_topk_of_samples(value, None, segments, keys)
        if sparsity is None
        else check_topk_of_samples(None, value, segments, keys)
        for value in values or ()
    ]


def check_sparsities(sparsity: Sequence[float]) -> None:
    """Several shares of key blocks to leave out."""
    _check_several("sparsity", sparsity)
    for value in sparsity:
        check_topk(None, value, 1)


def _check_one_of(topk: object, sparsity: object) -> None:
    if (topk is None) == (sparsity is None):
        both = "both" if topk is not None else "neither"
        raise ValueError(f"topk, sparsity: expected exactly one of them, got {both}")


def _check_several(name: str, values: Any) -> None:
    if not _is_sequence(values):
        raise TypeError(f"{name}: expected a list of values, got {values!r}")
    if len(values) == 0:
        raise ValueError(f"{name}: expected at least one value, got none")


def check_sparsity(sparsity: float, source: str, got: object) -> None:
    """Raises ``ValueError`` where a share is not in [0, 1); ``source`` begins its message, ``got`` says what came."""
    if not 0.0 <= sparsity < 1.0:
        is_percent = not symbolic.is_symbolic(sparsity) and PERCENT[0] <= sparsity < PERCENT[1]
        percent = f"; did you mean {sparsity / 100:g}?" if is_percent else ""
        raise ValueError(f"{source}expected a number in [0, 1), got {got}{percent}")


def check_gate(gate: Tensor | float | None, q: Tensor) -> Tensor | float:
    """The gate as a float or as a tensor of q's shape (a view where it was broadcast).

    A float that ``torch.compile`` keeps symbolic becomes a tensor of no dimensions on the CPU.
    """
    if gate is None:
        return 1.0
    if isinstance(gate, Tensor):
        _check_tensor("compress_attn_weight", gate, (*DTYPES, torch.float64), q.device)
        if not _broadcasts(gate.shape, q.shape):
            raise ValueError(
                f"compress_attn_weight: expected q's shape {tuple(q.shape)} or one that broadcasts to it, "
                f"got {tuple(gate.shape)}"
            )
        return gate if _same_shape(gate.shape, q.shape) else gate.expand(q.shape)
    gate = check_number("compress_attn_weight", gate, "a tensor, a float or None")
    if not -LARGEST_FLOAT <= gate <= LARGEST_FLOAT:
        raise ValueError(f"compress_attn_weight: expected a finite number, got {gate}")
    if symbolic.is_symbolic(gate):
        # Whether the coarse output is needed at all stays a question that is asked of the number.
        return symbolic.as_tensor(gate) if gate != 0.0 else 0.0
    return float(gate)


def check_selection_dtype(dtype: torch.dtype | None) -> torch.dtype:
    if dtype is None:
        return torch.float32
    expected = f"{' or '.join(map(str, DTYPES))} or None"
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"selection_dtype: expected {expected}, got {type(dtype).__name__}")
    if dtype not in DTYPES:
        raise ValueError(f"selection_dtype: expected {expected}, got {dtype}")
    return dtype


def check_block_map(block_map: Tensor, problem: Problem, device: torch.device) -> None:
    """A bool map of the shape [B, H, n_q, n_k], or one that broadcasts to it."""
    _check_tensor("block_map", block_map, (torch.bool,), device)
    full = problem.map_shape
    if block_map.dim() < 2 or not _broadcasts(block_map.shape, full):
        raise ValueError(
            f"block_map: expected shape {full} or one that broadcasts to it, such as {full[1:]} or {full[2:]}, "
            f"got {tuple(block_map.shape)}"
        )


def check_map(block_map: Tensor) -> None:
    _check_tensor("block_map", block_map, (torch.bool,), None)
    if block_map.dim() != 4:
        raise ValueError(f"block_map: expected 4 dimensions [B, H, n_q, n_k], got shape {tuple(block_map.shape)}")


def check_scores(
    scores: Tensor, sizes: Tensor | None, *, block_size: int | Sequence[int], segments: Sequence[Any] | None
) -> tuple[tuple[int, int, int], Side]:
    """The tile, and the key blocks that the scores are of."""
    _check_tensor("scores", scores, (*DTYPES, torch.float64), None)
    if scores.dim() != 4 or any([size == 0 for size in scores.shape[1:]]):
        raise ValueError(f"scores: expected shape [B, H, n_q, n_k], nothing empty, got {tuple(scores.shape)}")
    tile = check_block_size(block_size, with_grid=segments is not None)
    num_q_blocks, num_kv_blocks = scores.shape[2:]
    block = math.prod(tile)
    if segments is None:
        keys = Side(1, num_kv_blocks * block, tile, None, "bhsd")
        if sizes is not None:
            _check_sizes("variable_block_sizes", sizes, keys, scores.device)
        return tile, keys
    if sizes is not None:
        raise ValueError("variable_block_sizes: expected None where segments are given")
    order, total = order_of_list(segments, tile)
    keys = Side(1, total, tile, order.grid, "bhsd", order.segments)
    for number in (num_q_blocks, num_kv_blocks):
        if number != keys.num_blocks:
            raise ValueError(
                f"segments: expected as many blocks as the scores have, {tuple(scores.shape[2:])}, "
                f"got {keys.num_blocks}"
            )
    return tile, keys


def check_indices(q2k_idx: Tensor, q2k_num: Tensor, problem: Problem, device: torch.device) -> tuple[Tensor, Tensor]:
    """Both as int32."""
    _check_tensor("q2k_idx", q2k_idx, INDEX_DTYPES, device)
    _check_tensor("q2k_num", q2k_num, INDEX_DTYPES, device)
    rows = (problem.batch, problem.queries.heads, problem.queries.num_blocks)
    if q2k_idx.dim() != 4 or not _same_shape(q2k_idx.shape[:3], rows):
        expected = f"({', '.join(map(str, rows))}, m)"
        raise ValueError(f"q2k_idx: expected shape {expected} for any m, got {tuple(q2k_idx.shape)}")
    if not _same_shape(q2k_num.shape, rows):
        raise ValueError(f"q2k_num: expected shape {rows}, got {tuple(q2k_num.shape)}")
    # Clamped first: what does not fit into int32 names no block either, and must not come to name one.
    if q2k_idx.dtype != torch.int32:
        q2k_idx = q2k_idx.clamp(-1, problem.keys.num_blocks).int()
    # A negative number has a meaning to the backends where the tokens are segments.
    if q2k_num.dtype != torch.int32 or problem.keys.segments is not None:
        q2k_num = q2k_num.clamp(0, q2k_idx.shape[3]).int()
    return q2k_idx, q2k_num


def check_block_size(block_size: int | Sequence[int], *, with_grid: bool) -> tuple[int, int, int]:
    if isinstance(block_size, bool):
        raise TypeError("block_size: expected an int or three ints (t, h, w), got bool")
    if not isinstance(block_size, (int, torch.SymInt)) and _is_sequence(block_size):
        tile = _check_triple("block_size", block_size)
        fault = fault_of_tile(tile)
        if fault is not None:
            raise ValueError(f"block_size: {fault}, got {tile} with {math.prod(tile)}")
        return tile
    tokens = check_int("block_size", block_size, "an int or three ints (t, h, w)")
    if not with_grid:
        fault = fault_of_tile((1, 1, tokens))
        if fault is not None:
            raise ValueError(f"block_size: {fault}, got {tokens}{hint_of_cube(tokens)}")
        return 1, 1, tokens
    if tokens not in TILE_OF_TOKENS:
        raise ValueError(
            f"block_size: expected a tile (t, h, w) or one of {tuple(TILE_OF_TOKENS)} where grid is given, "
            f"got {tokens}{hint_of_cube(tokens)}"
        )
    return TILE_OF_TOKENS[tokens]


def fault_of_tile(tile: tuple[int, int, int]) -> str | None:
    """What is expected of a block, where a tile has no number of tokens that one may have."""
    tokens = math.prod(tile)
    if tokens < 64 or tokens % 64 != 0:
        return "expected a positive multiple of 64 tokens"
    if tokens > LARGEST_BLOCK:
        return f"expected at most {LARGEST_BLOCK} tokens"
    return None


def hint_of_cube(side: int, cube: str = "({0}, {0}, {0})") -> str:
    """A question, where a number of tokens may have been meant as the side of a cube of them, which is written so."""
    is_side = 0 < side <= LONGEST_CUBE and side**3 % 64 == 0
    return f"; did you mean {cube.format(side)}?" if is_side else ""


def check_choice(source: str, name: Any, allowed: Sequence[str]) -> str:
    """The name, if it is one of those allowed.

    Args:
        source: the argument or environment variable that it came from.

    Raises:
        TypeError, ValueError: it is not; the message names the source, what was expected and what came.
    """
    if not isinstance(name, str):
        raise TypeError(f"{source}: expected a string, got {type(name).__name__}")
    if name not in allowed:
        raise ValueError(f"{source}: expected one of {tuple(allowed)}, got {name!r}")
    return name


def check_int(name: str, value: Any, expected: str = "an int") -> int:
    """An integer of any kind as an int, or as it is where it is symbolic."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return cast(int, value)
    # A tensor would be waited for.
    if not isinstance(value, (bool, Tensor)):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")


def check_number(name: str, value: Any, expected: str) -> float:
    """A real number of any kind as a float or int, or as it is where it is symbolic."""
    if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool):
        return cast(float, value)
    if _is_numpy_number(value):
        # The decimal that a number of fewer bits stands for: 0.7, where fp32 holds 0.699999988.
        return float(str(value))
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")


def _is_numpy_number(value: Any) -> bool:
    """Whether a value is a NumPy number, or an array of no dimensions: PyTorch's compiler makes that of one."""
    is_real = getattr(getattr(value, "dtype", None), "kind", "") in tuple("fiu")
    return is_real and getattr(value, "ndim", 1) == 0


def _same_shape(shape: Sequence[int], expected: Sequence[int]) -> bool:
    return len(shape) == len(expected) and all([a == b for a, b in zip(shape, expected, strict=True)])


def _broadcasts(shape: Sequence[int], full: Sequence[int]) -> bool:
    if len(shape) > len(full):
        return False
    return all([a == 1 or a == b for a, b in zip(reversed(shape), reversed(full), strict=False)])


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
    # A batch of nothing is one that PyTorch's attention takes.
    if any([size == 0 for size in x.shape[1:]]):
        raise ValueError(f"{name}: expected no empty dimension, got shape {tuple(x.shape)}")
    if x.stride(-1) != 1:
        raise ValueError(
            f"{name}: expected a contiguous last dimension (stride 1), got stride {x.stride(-1)}; "
            "call .contiguous() on it"
        )


def _is_sequence(value: Any) -> bool:
    """Whether a value may hold several integers: a list, a tuple, or a NumPy array, of no text."""
    # Integers are told by their types: a symbolic one has no attributes that a compiler could look up.
    if isinstance(value, (int, torch.SymInt, str, bytes, bytearray, Tensor)):
        return False
    # PyTorch's compiler cannot ask a symbolic int for an attribute.
    is_int = isinstance(value, (int, torch.SymInt))
    return isinstance(value, Sequence) or (not is_int and getattr(value, "ndim", 0) > 0)


def _check_triple(name: str, value: Any) -> tuple[int, int, int]:
    if not _is_sequence(value):
        raise TypeError(f"{name}: expected three ints, got {type(value).__name__}")
    if len(value) != 3:
        raise ValueError(f"{name}: expected three ints, got {len(value)}: {tuple(value)}")
    for size in value:
        # What is an int already is not asked for more: PyTorch's compiler cannot ask it of a symbolic one.
        is_int = isinstance(size, (int, torch.SymInt)) and not isinstance(size, bool)
        if not is_int and (isinstance(size, (bool, Tensor)) or not hasattr(size, "__index__")):
            raise TypeError(f"{name}: expected three ints, got {type(size).__name__} in {tuple(value)}")
    t, h, w = [check_int(name, size, "three ints") for size in value]
    if t < 1 or h < 1 or w < 1:
        raise ValueError(f"{name}: expected three positive ints, got {(t, h, w)}")
    return t, h, w


def _check_sizes(name: str, sizes: Tensor, side: Side, device: torch.device) -> None:
    _check_tensor(name, sizes, INDEX_DTYPES, device)
    length, block, num_blocks = side.length, side.block, side.num_blocks
    if length % block != 0:
        raise ValueError(
            f"{name}: expected a sequence of whole blocks of {block} tokens (padded to full size), got length {length}"
        )
    if sizes.dim() != 1 or sizes.shape[0] != num_blocks:
        raise ValueError(f"{name}: expected shape ({num_blocks},), one size for each block, got {tuple(sizes.shape)}")
