"""The launches of the backward: its preparation, the inverse of the map, and one pass or two over the tiles.

Two passes compute the probabilities twice. That for dq keeps query blocks in place and streams keys, that for dk and dv
keeps key blocks in place and streams queries. Nothing is added in memory: gradients are the same bits on every run.

One pass computes them once: it keeps key blocks in place and adds dq up in memory, in fp32. Of larger blocks that takes
less time than computing the probabilities again. The order of the additions, and with it the last bits of dq, differ
from run to run, so that it is not taken where ``torch.are_deterministic_algorithms_enabled()``; nor is it where only
some of the gradients are needed, see ``takes_one_pass`` for the rest.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vsa_jit.backends.sm90 import specialise
from vsa_jit.backends.sm90.launch import (
    LOG2E,
    Launch,
    SideView,
    maps_of,
    set_coarse,
    set_map,
    tables_of,
    token_strides,
)
from vsa_jit.backends.sm90.layout import SizesRef, sizes_ref
from vsa_jit.backends.sm90.schedule import inverse_schedule_of, max_list_length, schedule_of, words_of
from vsa_jit.backends.sm90.segments import SegmentMaps
from vsa_jit.backends.sm90.structs import BOX_TOKENS, IndexBits, OrderRowsParams, TileLists, structures
from vsa_jit.backends.sm90.tma import TensorRef, largest_grid, why_not_tma
from vsa_jit.jit import module
from vsa_jit.problem import Gradients, Operands, Problem, bhsd, contiguous_like, empty_like

# One pass divides by the scale: with a smaller one the quotient might be infinite.
SMALLEST_SCALE = 2.0**-64
# Of the log-sum-exp and of delta, for a query.
STATISTICS = 2


def attend_backward(
    problem: Problem,
    operands: Operands,
    out_s: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    need_dq: bool,
    need_dkv: bool,
) -> Gradients:
    operands = operands._replace(q2k_idx=operands.q2k_idx.contiguous(), q2k_num=operands.q2k_num.contiguous())
    if (
        dout.stride(-1) != 1
        or why_not_tma(bhsd(dout, problem.queries.layout), largest_grid(problem.queries)) is not None
    ):
        dout = dout.contiguous()
    in_one_pass = need_dq and need_dkv and takes_one_pass(problem)
    inversion = _Inversion.of(problem, operands) if need_dkv else None
    prepared = prepare(problem, operands, out_s, lse, dout, dlse, in_one_pass, inversion)
    dq = dk = dv = None
    if need_dq and not in_one_pass:
        dq = backward_q(problem, operands, dout, prepared)
    if inversion is not None:
        inverse = inversion.bits, _order_rows(problem, inversion.bits)
        if in_one_pass:
            dq, dk, dv = backward_qkv(problem, operands, lse, dout, prepared, *inverse)
        else:
            dk, dv = backward_kv(problem, operands, dout, prepared, *inverse)
    return Gradients(dq, dk, dv, prepared.dgate, prepared.dout_c)


def takes_one_pass(problem: Problem) -> bool:
    """Whether all three gradients are computed in one pass, which adds up dq in memory, in an order that varies."""
    if problem.block < specialise.ONE_PASS_BLOCK or torch.are_deterministic_algorithms_enabled():
        return False
    return problem.softmax_scale >= SMALLEST_SCALE


class Prepared(NamedTuple):
    """What is computed before the passes.

    Attributes:
        statistics: of all queries, ``RowStatistics`` of ``backward.cuh``.
        counters: two numbers of 32 bits that are 0, one for each pass, see ``Launch.run_work_tiles``.
        dgate, dout_c: gradients, or None.
    """

    statistics: Tensor
    counters: Tensor
    dgate: Tensor | None
    dout_c: Tensor | None


def prepare(
    problem: Problem,
    operands: Operands,
    out_s: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    in_one_pass: bool = False,
    inversion: _Inversion | None = None,
) -> Prepared:
    """What the passes need of every query, and gradients of the coarse output and its gate; in the same launch the
    inversion of the map, if one is given."""
    q, queries = operands.q, problem.queries
    rows = (problem.batch, queries.heads, queries.num_blocks * queries.block)
    statistics = q.new_empty((*rows, STATISTICS), dtype=torch.float32)
    counters = q.new_empty(2, dtype=torch.int32)
    lse = lse.contiguous()
    launch = _prepare_launch(problem, q.dtype, q.get_device(), sizes_ref(operands.q_sizes), in_one_pass)
    params = launch.new_params()
    launch.set_segments(tables_of(problem, q), q, [params.queries])
    params.dout, params.out_s = dout.data_ptr(), out_s.data_ptr()
    params.lse, params.statistics = lse.data_ptr(), statistics.data_ptr()
    params.counters = counters.data_ptr()
    params.dout_strides[:] = token_strides(dout.stride(), queries)
    params.out_s_strides[:] = token_strides(out_s.stride(), queries)
    if dlse is not None:
        dlse = dlse.contiguous()
        params.dlse = dlse.data_ptr()
    dgate = dout_c = None
    out_c, gate = set_coarse(params.coarse, problem, operands)
    if out_c is not None:
        dout_c = contiguous_like(out_c)
        params.dout_c = dout_c.data_ptr()
    if gate is not None:
        dgate = contiguous_like(gate)
        params.dgate = dgate.data_ptr()
        params.dgate_strides[:] = token_strides(dgate.stride(), queries)
    if inversion is not None:
        params.inversion, params.inversion_blocks = inversion.params, inversion.blocks
    launch.launcher(launch.blocks + params.inversion_blocks, params)
    if dgate is not None and operands.gate is not None:
        dgate = dgate.to(operands.gate.dtype)
    return Prepared(statistics, counters, dgate, dout_c)


@functools.lru_cache(maxsize=256)
def _prepare_launch(
    problem: Problem, dtype: torch.dtype, device: int, q_sizes: SizesRef | None, in_one_pass: bool
) -> Launch:
    queries = problem.queries
    has_segments = queries.segments is not None
    params = structures(has_segments).PrepareBackwardParams(
        queries=SideView(problem, queries, q_sizes, padded=False).layout(),
        heads=queries.heads,
        num_blocks=queries.num_blocks,
        q_len=queries.length,
        shift_factor=-1.0 / problem.softmax_scale if in_one_pass else LOG2E,
        delta_factor=-1.0 if in_one_pass else 1.0,
    )
    launcher = module.launcher(specialise.prepare_backward(dtype, problem.head_dim, has_segments), device)
    return Launch(params, problem.batch * queries.heads * queries.num_blocks, launcher)


class _Inversion(NamedTuple):
    """The inversion of a map: its parameters, and how many thread blocks take part.

    Attributes:
        bits: what it makes, int32 [B, H, words, n_k], bit i of word w for query block 32 w + i.
    """

    bits: Tensor
    params: Any
    blocks: int

    @classmethod
    def of(cls, problem: Problem, operands: Operands) -> _Inversion:
        q2k_idx, q2k_num, num_kv_blocks = operands.q2k_idx, operands.q2k_num, problem.keys.num_blocks
        batch, heads, num_q_blocks, width = q2k_idx.shape
        words = words_of(num_q_blocks)
        bits = q2k_idx.new_empty((batch, heads, words, num_kv_blocks))
        of_layout = structures(problem.keys.segments is not None)
        table = of_layout.IndexTable(width=width, num_rows=num_q_blocks, num_cols=num_kv_blocks)
        set_map(tables_of(problem, q2k_idx), table, q2k_idx, q2k_num)
        return cls(bits, of_layout.Inversion(table, bits.data_ptr(), words), batch * heads * words)


def transpose_index(problem: Problem, operands: Operands) -> tuple[Tensor, Tensor]:
    """The query blocks of each key block, and the key blocks from the one that most query blocks name to the one that
    fewest do. Of the operands the indices are read, which must be contiguous.

    Returns:
        ``(bits, order)``: int32 [B, H, words, n_k], bit i of word w for query block 32 w + i; int32 [B, H_kv, n_k].
    """
    inversion, q = _Inversion.of(problem, operands), operands.q
    has_segments = problem.keys.segments is not None
    launcher = module.launcher(specialise.prepare_backward(q.dtype, problem.head_dim, has_segments), q.get_device())
    params = structures(has_segments).PrepareBackwardParams(
        inversion=inversion.params, inversion_blocks=inversion.blocks
    )
    launcher(inversion.blocks, params)
    return inversion.bits, _order_rows(problem, inversion.bits)


def _order_rows(problem: Problem, bits: Tensor) -> Tensor:
    """The order of ``transpose_index``, from its bits."""
    batch, _, words, num_rows = bits.shape
    heads = problem.keys.heads
    order = bits.new_empty((batch, heads, num_rows))
    classes = torch.empty_like(order, dtype=torch.uint8)
    rows = IndexBits(
        bits=bits.data_ptr(),
        num_words=words,
        num_rows=num_rows,
        num_cols=problem.queries.num_blocks,
        group=problem.group,
    )
    sort = module.launcher(specialise.order_rows(), bits.get_device())
    sort(batch * heads, OrderRowsParams(rows, order.data_ptr(), classes.data_ptr()))
    return order


class _Refs(NamedTuple):
    """Where the tensors of a call are: what a launch depends on beside the problem."""

    dtype: torch.dtype
    device: int
    q: TensorRef
    k: TensorRef
    v: TensorRef
    dout: TensorRef
    q_sizes: SizesRef | None
    kv_sizes: SizesRef | None

    @classmethod
    def of(cls, operands: Operands, dout: Tensor) -> _Refs:
        q, k, v, _, _, q_sizes, kv_sizes, *_ = operands
        q_ref, k_ref, v_ref, dout_ref = ((x.data_ptr(), x.stride()) for x in (q, k, v, dout))
        sizes = sizes_ref(q_sizes), sizes_ref(kv_sizes)
        return cls(q.dtype, q.get_device(), q_ref, k_ref, v_ref, dout_ref, *sizes)


def backward_q(problem: Problem, operands: Operands, dout: Tensor, prepared: Prepared) -> Tensor:
    q2k_idx, q2k_num = operands.q2k_idx, operands.q2k_num
    dq = empty_like(operands.q)
    launch = _backward_q_launch(problem, _Refs.of(operands, dout), q2k_idx.shape[-1], dq.stride())
    params = launch.new_params()
    tables = tables_of(problem, dq)
    set_map(tables, params.schedule.rows, q2k_idx, q2k_num)
    tensors = params.q, params.k, params.v, params.dout
    _maps = launch.set_segments(tables, dq, (params.queries, params.keys), tensors)
    params.dq, params.statistics = dq.data_ptr(), prepared.statistics.data_ptr()
    launch.run_work_tiles(params, dq, prepared.counters.data_ptr())
    return dq


@functools.lru_cache(maxsize=256)
def _backward_q_launch(problem: Problem, refs: _Refs, width: int, dq_strides: tuple[int, ...]) -> Launch:
    queries = SideView(problem, problem.queries, refs.q_sizes, padded=False)
    keys = SideView(problem, problem.keys, refs.kv_sizes, padded=refs.kv_sizes is not None)
    consumers = specialise.Q_CONSUMERS[problem.head_dim]
    length = max_list_length(queries.side, keys.side, width, consumers)
    has_segments = problem.queries.segments is not None
    params = structures(has_segments).AttendBackwardQParams(
        *_tensors(queries, keys, refs),
        queries=queries.layout(),
        keys=keys.layout(),
        schedule=schedule_of(problem, width, refs.device, consumers),
        lists=TileLists(length=length),
        scale=problem.softmax_scale,
        scale_log2=problem.softmax_scale * LOG2E,
    )
    params.dq_strides[:] = token_strides(dq_strides, queries.side)
    launcher = module.launcher(specialise.attend_backward_q(refs.dtype, problem.head_dim, has_segments), refs.device)
    return Launch.of_work_tiles(params, launcher, refs.device, maps=_maps_of(problem, refs))


def backward_kv(
    problem: Problem,
    operands: Operands,
    dout: Tensor,
    prepared: Prepared,
    bits: Tensor,
    order: Tensor,
    sums: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """dk and dv; where ``sums`` is given, the pass for all three, which adds dq to it."""
    dk, dv = empty_like(operands.k), empty_like(operands.v)
    launch = _backward_kv_launch(problem, _Refs.of(operands, dout), dk.stride(), dv.stride(), sums is not None)
    params = launch.new_params()
    tensors = params.q, params.k, params.v, params.dout
    _maps = launch.set_segments(tables_of(problem, dk), dk, (params.queries, params.keys), tensors)
    if sums is not None:
        params.dq = sums.data_ptr()
    rows = params.schedule.rows
    rows.bits, rows.order = bits.data_ptr(), order.data_ptr()
    params.dk, params.dv, params.statistics = dk.data_ptr(), dv.data_ptr(), prepared.statistics.data_ptr()
    launch.run_work_tiles(params, dk, prepared.counters.data_ptr() + prepared.counters.element_size())
    return dk, dv


@functools.lru_cache(maxsize=256)
def _backward_kv_launch(
    problem: Problem, refs: _Refs, dk_strides: tuple[int, ...], dv_strides: tuple[int, ...], in_one_pass: bool
) -> Launch:
    """Of the pass for dk and dv, or of that for all three, which must not read keys that are not valid."""
    queries = SideView(problem, problem.queries, refs.q_sizes, padded=refs.q_sizes is not None)
    keys = SideView(problem, problem.keys, refs.kv_sizes, padded=in_one_pass and refs.kv_sizes is not None)
    side = queries.side
    has_segments = side.segments is not None
    params = structures(has_segments).PassOverQueriesParams(
        *_tensors(queries, keys, refs),
        queries=queries.layout(),
        keys=keys.layout(),
        schedule=inverse_schedule_of(problem, refs.device, boxes=2 if in_one_pass else 1),
        lists=TileLists(length=side.num_blocks * (side.block // BOX_TOKENS)),
        scale=problem.softmax_scale,
        scale_log2=problem.softmax_scale * LOG2E,
    )
    params.dk_strides[:] = token_strides(dk_strides, keys.side)
    params.dv_strides[:] = token_strides(dv_strides, keys.side)
    kernel = specialise.attend_backward_qkv if in_one_pass else specialise.attend_backward_kv
    launcher = module.launcher(kernel(refs.dtype, problem.head_dim, has_segments), refs.device)
    blocks_per_processor = 1 if in_one_pass else specialise.KV_THREAD_BLOCKS[problem.head_dim]
    return Launch.of_work_tiles(params, launcher, refs.device, blocks_per_processor, _maps_of(problem, refs))


def backward_qkv(
    problem: Problem,
    operands: Operands,
    lse: Tensor,
    dout: Tensor,
    prepared: Prepared,
    bits: Tensor,
    order: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    q, queries = operands.q, problem.queries
    # What is summed up of dq, see ``DqSums`` of ``backward.cuh``.
    sums = q.new_zeros((*bits.shape[:2], queries.length, problem.head_dim), dtype=torch.float32)
    dk, dv = backward_kv(problem, operands, dout, prepared, bits, order, sums)
    dq = empty_like(q)
    _store_dq(problem, operands.q_sizes, sums, lse.contiguous(), dq)
    return dq, dk, dv


def _store_dq(problem: Problem, q_sizes: Tensor | None, sums: Tensor, lse: Tensor, dq: Tensor) -> None:
    launch = _store_dq_launch(problem, dq.dtype, dq.get_device(), sizes_ref(q_sizes), dq.stride())
    params = launch.new_params()
    launch.set_segments(tables_of(problem, dq), dq, [params.queries])
    params.sums, params.lse, params.dq = sums.data_ptr(), lse.data_ptr(), dq.data_ptr()
    launch.run(params)


@functools.lru_cache(maxsize=256)
def _store_dq_launch(
    problem: Problem, dtype: torch.dtype, device: int, q_sizes: SizesRef | None, dq_strides: tuple[int, ...]
) -> Launch:
    queries = problem.queries
    has_segments = queries.segments is not None
    params = structures(has_segments).StoreDqParams(
        queries=SideView(problem, queries, q_sizes, padded=q_sizes is not None).layout(),
        heads=queries.heads,
        num_blocks=queries.num_blocks,
        q_len=queries.length,
        scale=problem.softmax_scale,
    )
    params.dq_strides[:] = token_strides(dq_strides, queries)
    boxes = problem.batch * queries.heads * queries.num_blocks * (queries.block // BOX_TOKENS)
    return Launch(params, boxes, module.launcher(specialise.store_dq(dtype, problem.head_dim, has_segments), device))


def _tensors(queries: SideView, keys: SideView, refs: _Refs) -> list[Any]:
    """q, k, v and dout as TMA reads them."""
    tensors = ((queries, refs.q), (keys, refs.k), (keys, refs.v), (queries, refs.dout))
    return [side.tensor(tensor, refs.dtype, refs.device) for side, tensor in tensors]


def _maps_of(problem: Problem, refs: _Refs) -> SegmentMaps | None:
    queries, keys = problem.queries, problem.keys
    tensors = (queries, refs.q), (keys, refs.k), (keys, refs.v), (queries, refs.dout)
    return maps_of(problem, tensors, refs.dtype, refs.device)
