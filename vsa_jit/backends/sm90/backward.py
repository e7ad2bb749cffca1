"""The launches of the backward: its preparation, the inverse of the map, and two passes over the tiles.

The pass for dq keeps query blocks in place and streams keys, that for dk and dv keeps key blocks in place and streams
queries. Each computes the probabilities again, and nothing is added in memory: gradients are the same bits on every
run.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from vsa_jit.backends.sm90 import specialise
from vsa_jit.backends.sm90.launch import LOG2E, Launch, SideView, token_strides
from vsa_jit.backends.sm90.layout import SizesRef, sizes_ref
from vsa_jit.backends.sm90.schedule import inverse_schedule_of, max_list_length, schedule_of, words_of
from vsa_jit.backends.sm90.structs import (
    BOX_TOKENS,
    AttendBackwardKvParams,
    AttendBackwardQParams,
    IndexBits,
    IndexTable,
    InvertMapParams,
    OrderRowsParams,
    PrepareBackwardParams,
    TileLists,
    TokenTensor,
)
from vsa_jit.backends.sm90.tma import TensorRef, why_not_tma
from vsa_jit.jit import module
from vsa_jit.problem import Gradients, Operands, Problem, axes, bhsd, contiguous_like, empty_like

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
    if dout.stride(-1) != 1 or why_not_tma(bhsd(dout, problem.queries.layout), problem.queries.grid) is not None:
        dout = dout.contiguous()
    statistics, dgate, dout_c = prepare(problem, operands, out_s, lse, dout, dlse)
    dq = dk = dv = None
    if need_dq:
        dq = backward_q(problem, operands, dout, statistics)
    if need_dkv:
        inverse = transpose_index(operands.q2k_idx, operands.q2k_num, problem.keys.num_blocks, problem.group)
        dk, dv = backward_kv(problem, operands, dout, statistics, *inverse)
    return Gradients(dq, dk, dv, dgate, dout_c)


def prepare(
    problem: Problem, operands: Operands, out_s: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The statistics of all queries, ``RowStatistics`` of ``backward.cuh``; dgate and dout_c, or None."""
    q, out_c, gate = operands.q, operands.out_c, operands.gate
    queries = problem.queries
    rows = (problem.batch, queries.heads, queries.num_blocks * queries.block)
    statistics = q.new_empty((*rows, STATISTICS), dtype=torch.float32)
    lse = lse.contiguous()
    launch = _prepare_launch(problem, q.dtype, q.get_device(), sizes_ref(operands.q_sizes))
    params = PrepareBackwardParams.from_buffer_copy(launch.params)
    params.dout, params.out_s = dout.data_ptr(), out_s.data_ptr()
    params.lse, params.statistics = lse.data_ptr(), statistics.data_ptr()
    params.dout_strides[:] = token_strides(dout.stride(), queries)
    params.out_s_strides[:] = token_strides(out_s.stride(), queries)
    if dlse is not None:
        dlse = dlse.contiguous()
        params.dlse = dlse.data_ptr()
    computed = dout_c = None
    if out_c is not None:
        coarse, out_c, dout_c = params.coarse, out_c.contiguous(), contiguous_like(out_c)
        coarse.out_c, coarse.gate_value = out_c.data_ptr(), operands.gate_value
        params.dout_c = dout_c.data_ptr()
        if gate is not None:
            read = gate if gate.dtype in (q.dtype, torch.float32) else gate.float()
            computed = contiguous_like(read)
            coarse.gate, coarse.gate_is_fp32 = read.data_ptr(), read.dtype == torch.float32
            coarse.gate_strides[:] = [read.stride(axis) for axis in axes(queries.layout)]
            params.dgate = computed.data_ptr()
            params.dgate_strides[:] = token_strides(computed.stride(), queries)
    launch.launcher(launch.blocks, params)
    dgate = computed if computed is None or gate is None else computed.to(gate.dtype)
    return statistics, dgate, dout_c


@functools.lru_cache(maxsize=256)
def _prepare_launch(problem: Problem, dtype: torch.dtype, device: int, q_sizes: SizesRef | None) -> Launch:
    queries = problem.queries
    params = PrepareBackwardParams(
        queries=SideView(problem, queries, q_sizes, padded=False).layout(),
        heads=queries.heads,
        num_blocks=queries.num_blocks,
        q_len=queries.length,
    )
    launcher = module.launcher(specialise.prepare_backward(dtype, problem.head_dim), device)
    return Launch(params, problem.batch * queries.heads * queries.num_blocks, launcher)


def transpose_index(q2k_idx: Tensor, q2k_num: Tensor, num_kv_blocks: int, group: int = 1) -> tuple[Tensor, Tensor]:
    """The query blocks of each key block, and the key blocks from the one that most query blocks name to the one that
    fewest do.

    Args:
        group: query heads that share one key/value head.

    Returns:
        ``(bits, order)``: int32 [B, H, words, n_k], bit i of word w for query block 32 w + i; int32 [B, H_kv, n_k].
    """
    q2k_idx, q2k_num = q2k_idx.contiguous(), q2k_num.contiguous()
    batch, heads, num_q_blocks, width = q2k_idx.shape
    words, device = words_of(num_q_blocks), q2k_idx.get_device()
    bits = q2k_idx.new_empty((batch, heads, words, num_kv_blocks))
    table = IndexTable(q2k_idx.data_ptr(), q2k_num.data_ptr(), width, num_q_blocks, num_kv_blocks)
    invert = module.launcher(specialise.invert_map(), device)
    invert(batch * heads * words, InvertMapParams(table, bits.data_ptr(), words))
    order = q2k_idx.new_empty((batch, heads // group, num_kv_blocks))
    classes = torch.empty_like(order, dtype=torch.uint8)
    rows = IndexBits(bits=bits.data_ptr(), num_words=words, num_rows=num_kv_blocks, num_cols=num_q_blocks, group=group)
    sort = module.launcher(specialise.order_rows(), device)
    sort(batch * heads // group, OrderRowsParams(rows, order.data_ptr(), classes.data_ptr()))
    return bits, order


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


def backward_q(problem: Problem, operands: Operands, dout: Tensor, statistics: Tensor) -> Tensor:
    q2k_idx, q2k_num = operands.q2k_idx, operands.q2k_num
    dq = empty_like(operands.q)
    launch = _backward_q_launch(problem, _Refs.of(operands, dout), q2k_idx.shape[-1], dq.stride())
    params = AttendBackwardQParams.from_buffer_copy(launch.params)
    rows = params.schedule.rows
    rows.idx, rows.num = q2k_idx.data_ptr(), q2k_num.data_ptr()
    params.dq, params.statistics = dq.data_ptr(), statistics.data_ptr()
    launch.run_work_tiles(params, dq)
    return dq


@functools.lru_cache(maxsize=256)
def _backward_q_launch(problem: Problem, refs: _Refs, width: int, dq_strides: tuple[int, ...]) -> Launch:
    queries = SideView(problem, problem.queries, refs.q_sizes, padded=False)
    keys = SideView(problem, problem.keys, refs.kv_sizes, padded=refs.kv_sizes is not None)
    consumers = specialise.Q_CONSUMERS
    length = max_list_length(queries.side, keys.side, width, consumers)
    params = AttendBackwardQParams(
        *_tensors(queries, keys, refs),
        queries=queries.layout(),
        keys=keys.layout(),
        schedule=schedule_of(problem, width, refs.device, consumers),
        lists=TileLists(length=length),
        scale=problem.softmax_scale,
        scale_log2=problem.softmax_scale * LOG2E,
    )
    params.dq_strides[:] = token_strides(dq_strides, queries.side)
    launcher = module.launcher(specialise.attend_backward_q(refs.dtype, problem.head_dim), refs.device)
    return Launch.of_work_tiles(params, launcher, refs.device)


def backward_kv(
    problem: Problem, operands: Operands, dout: Tensor, statistics: Tensor, bits: Tensor, order: Tensor
) -> tuple[Tensor, Tensor]:
    dk, dv = empty_like(operands.k), empty_like(operands.v)
    launch = _backward_kv_launch(problem, _Refs.of(operands, dout), dk.stride(), dv.stride())
    params = AttendBackwardKvParams.from_buffer_copy(launch.params)
    rows = params.schedule.rows
    rows.bits, rows.order = bits.data_ptr(), order.data_ptr()
    params.dk, params.dv, params.statistics = dk.data_ptr(), dv.data_ptr(), statistics.data_ptr()
    launch.run_work_tiles(params, dk)
    return dk, dv


@functools.lru_cache(maxsize=256)
def _backward_kv_launch(
    problem: Problem, refs: _Refs, dk_strides: tuple[int, ...], dv_strides: tuple[int, ...]
) -> Launch:
    queries = SideView(problem, problem.queries, refs.q_sizes, padded=refs.q_sizes is not None)
    keys = SideView(problem, problem.keys, refs.kv_sizes, padded=False)
    side = queries.side
    params = AttendBackwardKvParams(
        *_tensors(queries, keys, refs),
        queries=queries.layout(),
        keys=keys.layout(),
        schedule=inverse_schedule_of(problem, refs.device),
        lists=TileLists(length=side.num_blocks * (side.block // BOX_TOKENS)),
        scale=problem.softmax_scale,
        scale_log2=problem.softmax_scale * LOG2E,
    )
    params.dk_strides[:] = token_strides(dk_strides, keys.side)
    params.dv_strides[:] = token_strides(dv_strides, keys.side)
    launcher = module.launcher(specialise.attend_backward_kv(refs.dtype, problem.head_dim), refs.device)
    return Launch.of_work_tiles(params, launcher, refs.device)


def _tensors(queries: SideView, keys: SideView, refs: _Refs) -> list[TokenTensor]:
    """Tensor maps of q, k, v and dout."""
    tensors = ((queries, refs.q), (keys, refs.k), (keys, refs.v), (queries, refs.dout))
    return [side.tiles_of(tensor, refs.dtype, refs.device) for side, tensor in tensors]
