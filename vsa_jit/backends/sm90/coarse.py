"""The coarse branch: attention of block means and the key blocks of highest score, in one launch; and its backward."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vsa_jit.backends.coarse import rounded_means, selection_table
from vsa_jit.backends.sm90 import specialise
from vsa_jit.backends.sm90.launch import Launch, persistent_blocks
from vsa_jit.backends.sm90.structs import (
    COARSE_SCORE_COLS,
    COARSE_TILE_ROWS,
    CoarseAttendParams,
    CoarseBackwardKvParams,
    CoarseBackwardQParams,
    CoarseProblem,
)
from vsa_jit.jit import module
from vsa_jit.jit.kernel import Kernel
from vsa_jit.problem import Coarse
from vsa_jit.segments import Segments, width_of_selection
from vsa_jit.tables import on_device

# Scores that the backward has at a time, twice over. It has not allocated the gradients of q, k and v by then.
SCORES_AT_A_TIME = 1 << 27
# How many query blocks a row tile may have, and what a tile takes besides, as if it had so many more.
TILE_ROWS = (16, 32, COARSE_TILE_ROWS)
ROWS_OF_A_TILE = 16
# As coarse.cuh has them.
ROUNDINGS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def coarse_attend(
    coarse: Coarse,
    q_c: Tensor,
    k_c: Tensor,
    v_c: Tensor | None,
    kv_sizes: Tensor | None,
    topk: Sequence[int],
    compete: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    q, k, v = _means(coarse.selection_dtype, q_c, k_c, v_c)
    topk, width = clamped(coarse, topk, k.shape[2])
    out = None if v is None else torch.empty_like(q)
    idx = q.new_empty((*q.shape[:3], width), dtype=torch.int32)
    num = q.new_empty(q.shape[:3], dtype=torch.int32)
    scores = q.new_empty(num_scores(coarse, q.shape, k.shape, q.get_device(), width))
    launch_attend(coarse, q.device, (q, k, v), kv_sizes, topk, compete, out, idx, num, scores)
    return out, idx, num


def clamped(coarse: Coarse, topk: Sequence[int], num_kv_blocks: int) -> tuple[tuple[int, ...], int]:
    """The key blocks to select of each sample, and room for those of a row."""
    topk = tuple([min(count, num_kv_blocks) for count in topk])
    return topk, width_of_selection(coarse.segments, topk, num_kv_blocks)


def num_scores(coarse: Coarse, q_shape: Sequence[int], k_shape: Sequence[int], device: int, width: int) -> int:
    """How many scores the thread blocks of a launch hold."""
    launch = _attend_launch(coarse, tuple(q_shape), tuple(k_shape), device, width)
    return launch.blocks * launch.params.problem.tile_rows * launch.params.problem.row_floats


def launch_attend(
    coarse: Coarse,
    device: torch.device,
    means: tuple[Any, Any, Any],
    kv_sizes: Tensor | None,
    topk: tuple[int, ...],
    compete: bool,
    out: Any,
    idx: Any,
    num: Any,
    scores: Any,
    means_done: tuple[int, int] | None = None,
) -> None:
    """``coarse_attend`` of means in their dtype: from tensors, or parts of an allocation, to such.

    Args:
        means_done: the counter of the launch before, which makes these means, and what it counts up to. Then scores are
            computed while that still sums those of v.
    """
    q, k, v = means
    launch = _attend_launch(coarse, tuple(q.shape), tuple(k.shape), device.index, idx.shape[-1])
    params = launch.new_params()
    params.q, params.k = q.data_ptr(), k.data_ptr()
    if v is not None:
        params.v, params.out = v.data_ptr(), out.data_ptr()
    params.idx, params.num, params.scores = idx.data_ptr(), num.data_ptr(), scores.data_ptr()
    if means_done is not None:
        params.means_done, params.means_arrivals = means_done
    segments = coarse.segments
    _set_columns(params.problem, kv_sizes, segments, device)
    if segments is not None:
        params.choices = selection_table(segments, topk, compete, device).data_ptr()
    launch.run(params)


@functools.lru_cache(maxsize=256)
def _attend_launch(
    coarse: Coarse, q_shape: tuple[int, ...], k_shape: tuple[int, ...], device: int, width: int
) -> Launch:
    problem = _problem_of(coarse, q_shape, k_shape, device)
    return _launch_of(CoarseAttendParams(problem=problem, width=width), specialise.coarse_attend(q_shape[3]), device)


def coarse_attend_backward(
    coarse: Coarse,
    q_c: Tensor,
    k_c: Tensor,
    v_c: Tensor,
    kv_sizes: Tensor | None,
    dout_c: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _means(coarse.selection_dtype, q_c, k_c, v_c)
    gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    launch_backward(coarse, (q, k, v), kv_sizes, dout_c.contiguous(), *gradients)
    return gradients


def launch_backward(
    coarse: Coarse, means: tuple[Any, Any, Any], kv_sizes: Tensor | None, dout: Tensor, dq: Any, dk: Any, dv: Any
) -> None:
    """``coarse_attend_backward`` likewise."""
    (q, k, v), segments, device = means, coarse.segments, dout.get_device()
    heads, num_rows = k.shape[0] * k.shape[1], q.shape[2]
    of_keys = num_rows * (q.shape[1] // k.shape[1]), k.shape[2]
    row_floats = _row_floats(k.shape[2], segments)
    step = min(heads, max(1, SCORES_AT_A_TIME // (of_keys[0] * row_floats)))
    # The probabilities, and the gradients of scores.
    matrices = dout.new_empty((2, step * of_keys[0] * row_floats))
    p, ds = matrices.data_ptr(), matrices.data_ptr() + matrices.nbytes // 2
    for first in range(0, heads, step):
        launches = _backward_launches(coarse, tuple(q.shape), tuple(k.shape), min(step, heads - first), device)
        of_q, of_kv = (launch.new_params() for launch in launches)
        for params in (of_q, of_kv):
            params.p, params.ds = p, ds
            params.q, params.dout = (_of_heads(x, first, of_keys[0]) for x in (q, dout))
        of_q.k, of_q.v = (_of_heads(x, first, of_keys[1]) for x in (k, v))
        of_q.dq = _of_heads(dq, first, of_keys[0])
        of_kv.dk, of_kv.dv = (_of_heads(x, first, of_keys[1]) for x in (dk, dv))
        _set_columns(of_q.problem, kv_sizes, segments, dout.device)
        _set_columns(of_kv.problem, None, segments, dout.device)
        for launch, params in zip(launches, (of_q, of_kv), strict=True):
            launch.run(params)


def _of_heads(x: Any, first: int, blocks: int) -> int:
    """Address of the means of a key/value head, of so many blocks, or of the query heads that share it."""
    return x.data_ptr() + first * blocks * x.shape[3] * torch.float32.itemsize


@functools.lru_cache(maxsize=256)
def _backward_launches(
    coarse: Coarse, q_shape: tuple[int, ...], k_shape: tuple[int, ...], kv_heads: int, device: int
) -> tuple[Launch, Launch]:
    """Those for so many key/value heads: by rows, and by columns."""
    queries = _problem_of(coarse, q_shape, k_shape, device)
    keys = CoarseProblem.from_buffer_copy(queries)
    keys.num_rows, keys.num_cols = k_shape[2], q_shape[2]
    _set_tiles(queries, coarse.segments, kv_heads * queries.group, device)
    _set_tiles(keys, coarse.segments, kv_heads * 2, device)
    of_q, of_kv = specialise.coarse_backward_q(q_shape[3]), specialise.coarse_backward_kv(q_shape[3])
    return (
        _launch_of(CoarseBackwardQParams(problem=queries), of_q, device),
        _launch_of(CoarseBackwardKvParams(problem=keys), of_kv, device),
    )


def _launch_of(params: Any, kernel: Kernel, device: int) -> Launch:
    blocks = persistent_blocks(device, params.problem.num_items)
    return Launch(params, blocks, module.launcher(kernel, device))


def _means(dtype: torch.dtype, *means: Tensor | None) -> list[Any]:
    """Means as the kernels read them, rounded to a dtype."""
    return [x if x is None else x.contiguous() for x in rounded_means(dtype, *means)]


def _problem_of(coarse: Coarse, q_shape: tuple[int, ...], k_shape: tuple[int, ...], device: int) -> CoarseProblem:
    batch, heads, num_rows, _ = q_shape
    _, kv_heads, num_cols, _ = k_shape
    problem = CoarseProblem(
        rounding=ROUNDINGS[coarse.selection_dtype],
        num_rows=num_rows,
        num_cols=num_cols,
        group=heads // kv_heads,
        row_floats=_row_floats(num_cols, coarse.segments),
        scale=coarse.softmax_scale,
    )
    _set_tiles(problem, coarse.segments, batch * heads, device)
    return problem


def _set_tiles(problem: CoarseProblem, segments: Segments | None, heads: int, device: int) -> None:
    """Chooses how high row tiles are: low ones where there are so few rows that processors would be idle."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count

    def cost(tile_rows: int) -> int:
        items = heads * _num_tiles(problem.num_rows, segments, tile_rows)
        return -(-items // processors) * (tile_rows + ROWS_OF_A_TILE)

    problem.tile_rows = min(TILE_ROWS, key=cost)
    problem.num_tiles = _num_tiles(problem.num_rows, segments, problem.tile_rows)
    problem.num_items = heads * problem.num_tiles


def _row_floats(num_cols: int, segments: Segments | None) -> int:
    """Of a row of scores: it has the columns of one sample."""
    if segments is not None:
        num_cols = max([sample.num_blocks for sample in segments.samples])
    return -(-num_cols // COARSE_SCORE_COLS) * COARSE_SCORE_COLS


def _num_tiles(num_rows: int, segments: Segments | None, tile_rows: int) -> int:
    if segments is None:
        return -(-num_rows // tile_rows)
    return sum([-(-sample.num_blocks // tile_rows) for sample in segments.samples])


def _set_columns(
    problem: CoarseProblem, kv_sizes: Tensor | None, segments: Segments | None, device: torch.device
) -> None:
    """Says which columns rows have. The sizes and the table live as long as the caller's and the device's."""
    if kv_sizes is not None:
        problem.sizes, problem.sizes_are_64_bit = kv_sizes.data_ptr(), kv_sizes.dtype == torch.int64
    if segments is not None:
        tile_rows = problem.tile_rows
        key = "row tiles", segments, tile_rows
        problem.tiles = on_device(key, device, lambda: _row_tiles(segments, tile_rows)).data_ptr()


def _row_tiles(segments: Segments, tile_rows: int) -> Tensor:
    """The row tiles of a head, none of which has rows of two samples: int32 [tiles, 4], as ``RowTile``."""
    tiles = []
    for sample in segments.samples:
        begin, end = sample.first_block, sample.first_block + sample.num_blocks
        for row in range(begin, end, tile_rows):
            tiles.append((row, min(row + tile_rows, end), begin, end))
    return torch.tensor(tiles, dtype=torch.int32)
