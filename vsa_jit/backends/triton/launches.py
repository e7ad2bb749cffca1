"""The backend's functions: each prepares the arguments of Triton kernels and launches them.

Video tiles are read from the raster by computed row offsets: nothing is padded, gathered or copied.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vsa_jit.backends import coarse
from vsa_jit.backends.coarse import Softmax
from vsa_jit.backends.triton import config
from vsa_jit.backends.triton.backward import (
    attend_backward_kv_kernel,
    attend_backward_q_kernel,
    prepare_backward_kernel,
)
from vsa_jit.backends.triton.blocks import block_table, product_tiles
from vsa_jit.backends.triton.forward import attend_forward_kernel
from vsa_jit.backends.triton.means import block_mean_backward_kernel, block_means_kernel
from vsa_jit.backends.triton.product import matmul_kernel
from vsa_jit.backends.triton.rows import reciprocal
from vsa_jit.backends.triton.runs import find_runs_kernel
from vsa_jit.backends.triton.select import map_to_indices_kernel, select_kernel, transpose_index_kernel
from vsa_jit.backends.triton.softmax import softmax_backward_kernel, softmax_kernel
from vsa_jit.problem import Gradients, MeanGradients, Operands, Problem, Side, axes, contiguous_like, empty_like
from vsa_jit.segments import Segments

# The backward always takes two passes, and each operator's results are tensors.
takes_one_pass = whole = None
LOG2E = math.log2(math.e)
TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
INT32_MAX = 2**31 - 1
# Query blocks that one program of the counting sort handles, and the most programs for each head.
ROWS_PER_CHUNK = 16
MAX_CHUNKS = 64
# One warp holds all rows of a sum: several would have to meet in shared memory.
_MEANS_LAUNCH = {"ROWS": 32, "num_warps": 1}
# Query blocks that are looked at together.
_RUNS_LAUNCH = {"ROWS": 512, "num_warps": 4}


def block_means(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor | None, q_sizes: Tensor | None, kv_sizes: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    queries, keys, layout = problem.queries, problem.keys, problem.queries.layout
    q_rows = (problem.batch, queries.heads, queries.num_blocks)
    kv_rows = (problem.batch, keys.heads, keys.num_blocks)
    q_c = q.new_empty((*q_rows, problem.head_dim), dtype=torch.float32)
    k_c = q.new_empty((*kv_rows, problem.head_dim), dtype=torch.float32)
    v_c = None if v is None else torch.empty_like(k_c)
    q_programs, kv_programs = math.prod(q_rows), math.prod(kv_rows)
    with torch.cuda.device_of(q):
        block_means_kernel[(q_programs + (1 if v is None else 2) * kv_programs,)](
            q,
            k,
            v,
            q_c,
            k_c,
            v_c,
            q_sizes,
            kv_sizes,
            _blocks(queries, q.device),
            *_strides(q, layout),
            *_strides(k, layout),
            *((0, 0, 0) if v is None else _strides(v, layout)),
            queries.heads,
            keys.heads,
            queries.num_blocks,
            keys.num_blocks,
            q_programs,
            kv_programs,
            queries.length,
            keys.length,
            *_geometry(problem.queries),
            **_head_and_tile(problem.queries, problem.head_dim),
            **_masks(problem, q_sizes, kv_sizes),
            **_MEANS_LAUNCH,
        )
    return q_c, k_c, v_c


def block_mean_backward(side: Side, dmean: Tensor, x: Tensor, sizes: Tensor | None) -> Tensor:
    dx = empty_like(x)
    batch, heads, blocks, head_dim = dmean.shape
    with torch.cuda.device_of(x):
        block_mean_backward_kernel[(batch * heads * blocks,)](
            dmean.contiguous(),
            dx,
            sizes,
            _blocks(side, x.device),
            *_strides(dx, side.layout),
            heads,
            blocks,
            side.length,
            *_geometry(side),
            **_head_and_tile(side, head_dim),
            HAS_SIZES=sizes is not None,
            MASK=sizes is not None or side.is_partial,
            **_MEANS_LAUNCH,
        )
    return dx


def matmul(a: Tensor, b: Tensor) -> Tensor:
    out = a.new_empty((a.shape[0], a.shape[1], b.shape[2]))
    return _matmul(a, b, out, None, False)


def matmul_of_samples(a: Tensor, b: Tensor, segments: Segments) -> Tensor:
    out = a.new_empty((a.shape[0], a.shape[1], b.shape[2]))
    return _matmul(a, b, out, segments, False)


def matmul_over_samples(a: Tensor, b: Tensor, segments: Segments) -> Tensor:
    out = a.new_empty((a.shape[0], a.shape[1], b.shape[2]))
    return _matmul(a, b, out, segments, True)


def _matmul(a: Tensor, b: Tensor, out: Tensor, segments: Segments | None, over_blocks: bool) -> Tensor:
    rows, m, k = a.shape
    n = b.shape[2]
    tiles, depth = config.matmul(along_sum=b.stride(1) < b.stride(2))
    table, num_tiles = None, None
    programs = rows * triton.cdiv(m, tiles.rows) * triton.cdiv(n, tiles.columns)
    if segments is not None:
        table = product_tiles(segments, tiles.rows, tiles.columns, n if over_blocks else None, a.device)
        num_tiles = len(table)
        programs = rows * num_tiles
    with torch.cuda.device_of(a):
        matmul_kernel[(programs,)](
            a,
            b,
            out,
            table,
            num_tiles,
            m,
            n,
            k,
            *a.stride(),
            *b.stride(),
            OVER_BLOCKS=over_blocks,
            BLOCK_K=depth,
            **tiles.launch,
        )
    return out


def select(scores: Tensor, kv_sizes: Tensor | None, topk: int, softmax: Softmax | None = None) -> tuple[Tensor, Tensor]:
    return _select(scores, kv_sizes, None, topk, softmax)


def select_in_samples(
    scores: Tensor, rows: Tensor, width: int, softmax: Softmax | None = None
) -> tuple[Tensor, Tensor]:
    return _select(scores, None, rows, width, softmax)


def _select(
    scores: Tensor, kv_sizes: Tensor | None, rows: Tensor | None, width: int, softmax: Softmax | None
) -> tuple[Tensor, Tensor]:
    q2k_idx, q2k_num = _new_indices(scores, width)
    columns = triton.next_power_of_2(scores.shape[-1])
    with torch.cuda.device_of(scores):
        select_kernel[(q2k_num.numel(),)](
            scores,
            kv_sizes,
            rows,
            q2k_idx,
            q2k_num,
            scores.shape[-1],
            width,
            *_scales(softmax),
            COLUMNS=columns,
            WIDTH_PAD=triton.next_power_of_2(width),
            HAS_SIZES=kv_sizes is not None,
            DTYPE=None if softmax is None else TRITON_DTYPES[softmax.dtype],
            num_warps=_row_warps(columns),
        )
    return q2k_idx, q2k_num


def softmax(products: Tensor, kv_sizes: Tensor | None, rows: Tensor | None, settings: Softmax) -> None:
    columns = triton.next_power_of_2(products.shape[-1])
    with torch.cuda.device_of(products):
        softmax_kernel[(products.shape[0] * products.shape[1],)](
            products,
            kv_sizes,
            rows,
            products.shape[-1],
            *_scales(settings),
            COLUMNS=columns,
            HAS_SIZES=kv_sizes is not None,
            DTYPE=TRITON_DTYPES[settings.dtype],
            num_warps=_row_warps(columns),
        )


def softmax_backward(p: Tensor, dp: Tensor, rows: Tensor | None, scale: float) -> None:
    columns = triton.next_power_of_2(p.shape[-1])
    with torch.cuda.device_of(p):
        softmax_backward_kernel[(p.shape[0] * p.shape[1],)](
            p, dp, rows, p.shape[-1], scale, COLUMNS=columns, num_warps=_row_warps(columns)
        )


def _scales(softmax: Softmax | None) -> tuple[float, float]:
    """The scale of products, and log2(e) times what is left to scale in the exponent: the scale where it is fp32."""
    if softmax is None:
        return 1.0, 1.0
    return softmax.scale, LOG2E * (softmax.scale if softmax.dtype == torch.float32 else 1.0)


def map_to_indices(block_map: Tensor) -> tuple[Tensor, Tensor]:
    q2k_idx, q2k_num = _new_indices(block_map, block_map.shape[-1])
    columns = triton.next_power_of_2(block_map.shape[-1])
    with torch.cuda.device_of(block_map):
        map_to_indices_kernel[(q2k_num.numel(),)](
            block_map.contiguous(),
            q2k_idx,
            q2k_num,
            block_map.shape[-1],
            COLUMNS=columns,
            num_warps=_row_warps(columns),
        )
    return q2k_idx, q2k_num


def _new_indices(rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Room for so many indices of each row, and for their number."""
    shape = rows.shape[:-1]
    return rows.new_empty((*shape, width), dtype=torch.int32), rows.new_empty(shape, dtype=torch.int32)


def _row_warps(columns: int) -> int:
    """One warp holds a whole row where it can: its sums then need no barrier."""
    return min(max(columns // 2048, 1), 16)


def transpose_index(problem: Problem, operands: Operands) -> tuple[Tensor, Tensor, int, Tensor | None, Tensor | None]:
    """The query blocks of each key block, see ``invert_map`` and ``find_runs``."""
    return _transpose_index(problem, operands.q2k_idx, operands.q2k_num)


def _transpose_index(
    problem: Problem, q2k_idx: Tensor, q2k_num: Tensor
) -> tuple[Tensor, Tensor, int, Tensor | None, Tensor | None]:
    num_kv_blocks = problem.keys.num_blocks
    ranges, num_ranges = None, None
    if problem.keys.segments is not None:
        ranges, num_ranges = find_runs(q2k_idx, q2k_num, num_kv_blocks)
    return *invert_map(q2k_idx, q2k_num, num_kv_blocks), ranges, num_ranges


def find_runs(q2k_idx: Tensor, q2k_num: Tensor, num_kv_blocks: int) -> tuple[Tensor, Tensor]:
    """The ranges of query blocks that name the same run of key blocks, and how many each head has."""
    batch, heads, num_q_blocks, width = q2k_idx.shape
    ranges = q2k_idx.new_empty((batch * heads, num_q_blocks, 4))
    num_ranges = q2k_idx.new_empty(batch * heads)
    if width == 0:
        # There is no entry that could name a run.
        return ranges, num_ranges.zero_()
    with torch.cuda.device_of(q2k_idx):
        find_runs_kernel[(batch * heads,)](
            q2k_idx, q2k_num, ranges, num_ranges, num_q_blocks, num_kv_blocks, width, **_RUNS_LAUNCH
        )
    return ranges, num_ranges


def invert_map(q2k_idx: Tensor, q2k_num: Tensor, num_kv_blocks: int) -> tuple[Tensor, Tensor, int]:
    """The query blocks of each key block, by a counting sort on the GPU, the same bits on every run.

    Returns:
        ``(ends, k2q_idx, chunks)``: ``k2q_idx`` int32 holds, for each (batch, query head, key block) in order, the
        query blocks that name it, ascending; ``ends`` int64 [B·H·n_k·chunks] says where the entries of each cell end.
    """
    batch, heads, num_q_blocks, width = q2k_idx.shape
    rows = batch * heads
    rows_per_chunk = max(ROWS_PER_CHUNK, -(-num_q_blocks // MAX_CHUNKS))
    chunks = -(-num_q_blocks // rows_per_chunk)
    counts = torch.zeros(rows * num_kv_blocks * chunks, dtype=torch.int32, device=q2k_idx.device)
    k2q_idx = torch.empty(q2k_idx.numel(), dtype=torch.int32, device=q2k_idx.device)
    shape = (num_q_blocks, num_kv_blocks, width, chunks, rows_per_chunk)
    width_pad = triton.next_power_of_2(max(width, 1))
    constants: dict[str, Any] = {"WIDTH_PAD": width_pad, "num_warps": min(max(width_pad // 128, 1), 8)}
    with torch.cuda.device_of(q2k_idx):
        transpose_index_kernel[(rows * chunks,)](q2k_idx, q2k_num, counts, k2q_idx, *shape, PLACE=False, **constants)
        ends = counts.cumsum(0)
        begins = ends - counts
        transpose_index_kernel[(rows * chunks,)](q2k_idx, q2k_num, begins, k2q_idx, *shape, PLACE=True, **constants)
    return ends, k2q_idx, chunks


def attend(problem: Problem, operands: Operands, keep_out_s: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    q, k, v, q2k_idx, q2k_num, q_sizes, kv_sizes, out_c, gate, gate_value = operands
    queries, keys, layout = problem.queries, problem.keys, problem.queries.layout
    out = empty_like(q)
    out_s = empty_like(q) if keep_out_s else None
    lse = q.new_empty((problem.batch, queries.heads, queries.length), dtype=torch.float32)
    tiles = config.forward(problem.block, problem.head_dim, q.element_size(), config.architecture(q.device))
    programs = problem.batch * queries.heads * queries.num_blocks * (problem.block // tiles.rows)
    with torch.cuda.device_of(q):
        attend_forward_kernel[(programs,)](
            q,
            k,
            v,
            out,
            out_s,
            lse,
            q2k_idx.contiguous(),
            q2k_num.contiguous(),
            q_sizes,
            kv_sizes,
            _blocks(queries, q.device),
            gate,
            None if out_c is None else out_c.contiguous(),
            gate_value,
            *_strides(q, layout),
            *_strides(k, layout),
            *_strides(v, layout),
            *_strides(out, layout),
            *_gate_strides(gate, layout),
            queries.heads,
            queries.num_blocks,
            keys.num_blocks,
            q2k_idx.shape[-1],
            queries.length,
            keys.length,
            *_geometry(problem.queries),
            problem.softmax_scale,
            problem.softmax_scale * LOG2E,
            **_attention_constants(problem, q, q_sizes, kv_sizes, (k, v)),
            COMBINE=out_c is not None,
            HAS_GATE=gate is not None,
            KEEP_OUT_S=keep_out_s,
            **tiles.launch,
        )
    return out, lse, out_s


def attend_backward(
    problem: Problem,
    operands: Operands,
    out_s: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    need_dq: bool,
    need_dkv: bool,
    is_combined: bool = False,
    mean_gradients: MeanGradients | None = None,
) -> Gradients:
    q, k, v, q2k_idx, q2k_num, q_sizes, kv_sizes, out_c, gate, gate_value = operands
    queries, keys, layout = problem.queries, problem.keys, problem.queries.layout
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    q2k_idx, q2k_num = q2k_idx.contiguous(), q2k_num.contiguous()
    dgate = None if gate is None or out_c is None else contiguous_like(gate)
    dout_c = None if out_c is None else contiguous_like(out_c)
    padded = (problem.batch, queries.heads, queries.num_blocks, problem.block)
    shift = q.new_empty(padded, dtype=torch.float32)
    delta = q.new_empty(padded, dtype=torch.float32)
    with torch.cuda.device_of(q):
        prepare_backward_kernel[(problem.batch * queries.heads * queries.num_blocks,)](
            dout,
            out_s,
            lse.contiguous(),
            None if dlse is None else dlse.contiguous(),
            q_sizes,
            _blocks(queries, q.device),
            gate,
            None if out_c is None else out_c.contiguous(),
            dgate,
            dout_c,
            shift,
            delta,
            gate_value,
            *_strides(dout, layout),
            *_strides(out_s, layout),
            *_gate_strides(gate, layout),
            *_gate_strides(dgate, layout)[:3],
            queries.heads,
            queries.num_blocks,
            queries.length,
            *_geometry(queries),
            **_head_and_tile(queries, problem.head_dim),
            HAS_Q_SIZES=q_sizes is not None,
            HAS_DLSE=dlse is not None,
            COMBINE=out_c is not None,
            HAS_GATE=gate is not None,
            IS_COMBINED=is_combined and out_c is not None,
            EXACT=q.dtype == torch.float32,
            BLOCK_M=32,
            num_warps=4,
        )

    dq_c = dk_c = dv_c = None
    if mean_gradients is not None:
        dq_c, dk_c, dv_c = mean_gradients(dout_c)
    dq = dk = dv = None
    arch = config.architecture(q.device)
    if need_dq:
        dq = empty_like(q)
        tiles = config.backward_q(problem.block, problem.head_dim, q.element_size(), arch)
        programs = problem.batch * queries.heads * queries.num_blocks * (problem.block // tiles.rows)
        with torch.cuda.device_of(q):
            attend_backward_q_kernel[(programs,)](
                q,
                k,
                v,
                dout,
                dq,
                dq_c,
                shift,
                delta,
                q2k_idx,
                q2k_num,
                q_sizes,
                kv_sizes,
                _blocks(queries, q.device),
                *_strides(q, layout),
                *_strides(k, layout),
                *_strides(v, layout),
                *_strides(dout, layout),
                *_strides(dq, layout),
                queries.heads,
                queries.num_blocks,
                keys.num_blocks,
                q2k_idx.shape[-1],
                queries.length,
                keys.length,
                *_geometry(queries),
                problem.softmax_scale,
                problem.softmax_scale * LOG2E,
                **_attention_constants(problem, q, q_sizes, kv_sizes, (k, v)),
                **tiles.launch,
            )
    if need_dkv:
        dk, dv = empty_like(k), empty_like(v)
        ends, k2q_idx, chunks, ranges, num_ranges = _transpose_index(problem, q2k_idx, q2k_num)
        raster = _in_raster_order(queries)
        border = raster and queries.is_partial
        tiles = config.backward_kv(problem.block, problem.head_dim, q.element_size(), arch, raster, border)
        programs = problem.batch * keys.heads * keys.num_blocks * (problem.block // tiles.columns)
        with torch.cuda.device_of(q):
            attend_backward_kv_kernel[(programs,)](
                q,
                k,
                v,
                dout,
                dk,
                dv,
                dk_c,
                dv_c,
                shift,
                delta,
                ends,
                k2q_idx,
                ranges,
                num_ranges,
                q_sizes,
                kv_sizes,
                _blocks(queries, q.device),
                *_strides(q, layout),
                *_strides(k, layout),
                *_strides(v, layout),
                *_strides(dout, layout),
                *_strides(dk, layout),
                *_strides(dv, layout),
                keys.heads,
                queries.num_blocks,
                keys.num_blocks,
                chunks,
                queries.length,
                keys.length,
                *_geometry(queries),
                problem.softmax_scale,
                problem.softmax_scale * LOG2E,
                **_attention_constants(problem, q, q_sizes, kv_sizes, (q, dout)),
                **tiles.launch,
            )
    return Gradients(dq, dk, dv, dgate, dout_c)


def _strides(x: Tensor, layout: str) -> tuple[int, int, int]:
    b, h, s, _ = axes(layout)
    return x.stride(b), x.stride(h), x.stride(s)


def _gate_strides(gate: Tensor | None, layout: str) -> tuple[int, int, int, int]:
    return (0, 0, 0, 0) if gate is None else (*_strides(gate, layout), gate.stride(-1))


def _geometry(side: Side) -> tuple[int, ...]:
    """Extents of the video, its tiles in one frame and in one row of a frame, and their reciprocals."""
    if side.grid is None:
        return (1,) * 7
    tiles_h, tiles_w = (-(-side.grid[axis] // side.tile[axis]) for axis in (1, 2))
    return *side.grid, tiles_h * tiles_w, tiles_w, reciprocal(tiles_h * tiles_w), reciprocal(tiles_w)


def _head_and_tile(side: Side, head_dim: int) -> dict[str, Any]:
    tile_t, tile_h, tile_w = side.tile
    return {
        "D": head_dim,
        "D_PAD": triton.next_power_of_2(head_dim),
        "BLOCK": side.block,
        "TILE_T": tile_t,
        "TILE_H": tile_h,
        "TILE_W": tile_w,
        "RASTER": _in_raster_order(side),
    }


def _in_raster_order(side: Side) -> bool:
    """Whether blocks are tiles, of one video or of segments."""
    return side.grid is not None or side.segments is not None


def _blocks(side: Side, device: torch.device) -> Tensor | None:
    """The table of blocks, which only segments have."""
    return None if side.segments is None else block_table(side.segments, device)


def _masks(problem: Problem, q_sizes: Tensor | None, kv_sizes: Tensor | None) -> dict[str, bool]:
    return {
        "HAS_Q_SIZES": q_sizes is not None,
        "HAS_K_SIZES": kv_sizes is not None,
        "MASK_Q": q_sizes is not None or problem.queries.is_partial,
        "MASK_K": kv_sizes is not None or problem.keys.is_partial,
    }


def _attention_constants(
    problem: Problem, q: Tensor, q_sizes: Tensor | None, kv_sizes: Tensor | None, streamed: tuple[Tensor, Tensor]
) -> dict[str, Any]:
    """``streamed`` are the two tensors whose blocks are read in the inner loop."""
    reach = _block_reach(problem.keys)
    row_strides = [x.stride(axes(problem.keys.layout)[2]) for x in streamed]
    fits = reach * max(row_strides) + problem.head_dim <= INT32_MAX
    return {
        **_head_and_tile(problem.queries, problem.head_dim),
        "GROUP": problem.group,
        **_masks(problem, q_sizes, kv_sizes),
        "ALIKE": row_strides[0] == row_strides[1],
        "OFFSET": tl.int32 if fits else tl.int64,
        "EXACT": q.dtype == torch.float32,
    }


def _block_reach(side: Side) -> int:
    """The largest distance, in tokens, between two tokens of one block."""
    grids = [side.grid] if side.segments is None else [segment.grid for segment in side.segments.segments]
    t, h, w = side.tile
    return max(
        [side.block - 1 if grid is None else ((t - 1) * grid[1] + h - 1) * grid[2] + w - 1 for grid in grids],
    )


_COARSE_KERNELS = coarse.CoarseKernels(
    matmul, matmul_of_samples, matmul_over_samples, select, select_in_samples, softmax, softmax_backward
)
coarse_attend = functools.partial(coarse.coarse_attend, _COARSE_KERNELS)
coarse_attend_backward = functools.partial(coarse.coarse_attend_backward, _COARSE_KERNELS)
coarse_attend_tangent = functools.partial(coarse.coarse_attend_tangent, _COARSE_KERNELS)
