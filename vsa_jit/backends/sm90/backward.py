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
from vsa_jit.backends.sm90.memory import WORD_BYTES, Part, Parts
from vsa_jit.backends.sm90.schedule import inverse_schedule_of, max_list_length, schedule_of, words_of
from vsa_jit.backends.sm90.segments import SegmentMaps
from vsa_jit.backends.sm90.structs import BOX_TOKENS, GradientTensor, IndexBits, OrderRowsParams, TileLists, structures
from vsa_jit.backends.sm90.tma import ALIGNMENT_BYTES, TensorRef, largest_grid, why_not_tma
from vsa_jit.jit import module
from vsa_jit.problem import Gradients, MeanGradients, Operands, Problem, bhsd, contiguous_like, empty_like

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
    is_combined: bool = False,
    mean_gradients: MeanGradients | None = None,
) -> Gradients:
    q = operands.q
    operands = operands._replace(q2k_idx=operands.q2k_idx.contiguous(), q2k_num=operands.q2k_num.contiguous())
    if not _can_tma_read(problem, q, dout):
        dout = dout.contiguous()
    refs = _Refs.of(operands, dout)
    in_one_pass = need_dq and need_dkv and takes_one_pass(problem)
    prepared = prepare(problem, operands, out_s, lse, dout, dlse, in_one_pass, need_dkv, is_combined)
    workspace = prepared.workspace
    of_q = of_k = of_v = None
    if mean_gradients is not None:
        of_q, of_k, of_v = mean_gradients(prepared.dout_c)
    dq = dk = dv = None
    if need_dq and not in_one_pass:
        dq = backward_q(problem, operands, refs, workspace, of_q)
    if need_dkv:
        _order_rows(problem, workspace, q.get_device())
        if in_one_pass:
            dq, dk, dv = backward_qkv(problem, operands, lse, refs, workspace, of_q, of_k, of_v)
        else:
            dk, dv = backward_kv(problem, operands, refs, workspace, of_k, of_v)
    return Gradients(dq, dk, dv, prepared.dgate, prepared.dout_c)


def _can_tma_read(problem: Problem, q: Tensor, dout: Tensor) -> bool:
    if dout.stride() == q.stride() and dout.data_ptr() % ALIGNMENT_BYTES == 0:
        # It lies as q does, which TMA reads.
        return True
    side = problem.queries
    return dout.stride(-1) == 1 and why_not_tma(bhsd(dout, side.layout), largest_grid(side)) is None


def takes_one_pass(problem: Problem) -> bool:
    """Whether all three gradients are computed in one pass, which adds up dq in memory, in an order that varies."""
    if problem.block < specialise.ONE_PASS_BLOCK or torch.are_deterministic_algorithms_enabled():
        return False
    return problem.softmax_scale >= SMALLEST_SCALE


class Workspace(NamedTuple):
    """What is computed before the passes, and what they take work tiles by, in one allocation.

    Attributes:
        statistics: of all queries, ``RowStatistics`` of ``backward.cuh``.
        counters: two numbers of 32 bits that are 0, one for each pass, see ``Launch.run_work_tiles``.
        bits, order: the inverse of the map, see ``transpose_index``; ``classes`` is for ``order_rows.cu``.
    """

    memory: Tensor
    statistics: Part
    counters: Part
    bits: Part
    order: Part
    classes: Part

    @classmethod
    def of(cls, problem: Problem, like: Tensor) -> Workspace:
        parts = _parts_of_workspace(problem)
        memory = like.new_empty(parts.num_bytes, dtype=torch.uint8)
        return cls(memory, *parts.at(memory.data_ptr()))


@functools.lru_cache(maxsize=1024)
def _parts_of_workspace(problem: Problem) -> Parts:
    queries, keys = problem.queries, problem.keys
    statistics = problem.batch, queries.heads, queries.num_blocks * queries.block, STATISTICS
    of_keys = problem.batch, keys.heads, keys.num_blocks
    # A class has a byte.
    return Parts.of(statistics, (2,), _bits_shape(problem), of_keys, of_keys)


def _bits_shape(problem: Problem) -> tuple[int, int, int, int]:
    return problem.batch, problem.queries.heads, words_of(problem.queries.num_blocks), problem.keys.num_blocks


class Prepared(NamedTuple):
    """What is computed before the passes; the gradients may be None."""

    workspace: Workspace
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
    with_inversion: bool = False,
    is_combined: bool = False,
) -> Prepared:
    """What the passes need of every query, and gradients of the coarse output and its gate; in the same launch the
    inversion of the map, if it is wanted."""
    q, queries = operands.q, problem.queries
    workspace = Workspace.of(problem, q)
    lse = lse.contiguous()
    width = operands.q2k_idx.shape[-1] if with_inversion else None
    launch = _prepare_launch(problem, q.dtype, q.get_device(), sizes_ref(operands.q_sizes), in_one_pass, width)
    params = launch.new_params()
    launch.set_segments(tables_of(problem, q), q, [params.queries])
    params.dout, params.out_s = dout.data_ptr(), out_s.data_ptr()
    params.lse, params.statistics = lse.data_ptr(), workspace.statistics.address
    params.counters = workspace.counters.address
    params.dout_strides[:] = token_strides(dout.stride(), queries)
    params.out_s_strides[:] = token_strides(out_s.stride(), queries)
    if dlse is not None:
        dlse = dlse.contiguous()
        params.dlse = dlse.data_ptr()
    dgate = dout_c = None
    out_c, gate = set_coarse(params.coarse, problem, operands)
    if out_c is not None:
        dout_c = q.new_empty(out_c.shape, dtype=torch.float32)
        params.dout_c = dout_c.data_ptr()
        params.is_combined = is_combined
    if gate is not None:
        dgate = contiguous_like(gate)
        params.dgate = dgate.data_ptr()
        params.dgate_strides[:] = token_strides(dgate.stride(), queries)
    if with_inversion:
        _set_inversion(problem, params.inversion, operands, workspace)
    launch.launcher(launch.blocks + params.inversion_blocks, params)
    if dgate is not None and operands.gate is not None and dgate.dtype != operands.gate.dtype:
        dgate = dgate.to(operands.gate.dtype)
    return Prepared(workspace, dgate, dout_c)


@functools.lru_cache(maxsize=256)
def _prepare_launch(
    problem: Problem,
    dtype: torch.dtype,
    device: int,
    q_sizes: SizesRef | None,
    in_one_pass: bool,
    width: int | None,
) -> Launch:
    """Of the preparation; and, if the width of a map is given, of its inversion by further thread blocks."""
    queries = problem.queries
    of_layout = structures(queries.segments is not None)
    params = of_layout.PrepareBackwardParams(
        queries=SideView(problem, queries, q_sizes, padded=False).layout(),
        heads=queries.heads,
        num_blocks=queries.num_blocks,
        q_len=queries.length,
        shift_factor=-1.0 / problem.softmax_scale if in_one_pass else LOG2E,
        delta_factor=-1.0 if in_one_pass else 1.0,
    )
    if width is not None:
        table = of_layout.IndexTable(width=width, num_rows=queries.num_blocks, num_cols=problem.keys.num_blocks)
        batch, heads, words, _ = _bits_shape(problem)
        params.inversion = of_layout.Inversion(rows=table, num_words=words)
        params.inversion_blocks = batch * heads * words
    kernel = specialise.prepare_backward(dtype, problem.head_dim, queries.segments is not None)
    return Launch(params, problem.batch * queries.heads * queries.num_blocks, module.launcher(kernel, device))


def _set_inversion(problem: Problem, inversion: Any, operands: Operands, workspace: Workspace) -> None:
    set_map(tables_of(problem, operands.q), inversion.rows, operands.q2k_idx, operands.q2k_num)
    inversion.bits = workspace.bits.address


def invert_map(problem: Problem, operands: Operands) -> Workspace:
    """Of the workspace, ``bits`` and ``order`` alone."""
    q, device = operands.q, operands.q.get_device()
    workspace = Workspace.of(problem, q)
    launch = _prepare_launch(problem, q.dtype, device, None, False, operands.q2k_idx.shape[-1])
    params = launch.new_params()
    _set_inversion(problem, params.inversion, operands, workspace)
    launch.launcher(params.inversion_blocks, params)
    _order_rows(problem, workspace, device)
    return workspace


def transpose_index(problem: Problem, operands: Operands) -> tuple[Tensor, Tensor]:
    """The query blocks of each key block, and the key blocks from the one that most query blocks name to the one that
    fewest do. Of the operands the indices are read, which must be contiguous.

    Returns:
        ``(bits, order)``: int32 [B, H, words, n_k], bit i of word w for query block 32 w + i; int32 [B, H_kv, n_k].
    """
    workspace = invert_map(problem, operands)
    memory = workspace.memory
    return workspace.bits.tensor(memory, torch.int32), workspace.order.tensor(memory, torch.int32)


def _order_rows(problem: Problem, workspace: Workspace, device: int) -> None:
    """The order of ``transpose_index``, from its bits."""
    launch = _order_rows_launch(problem, device)
    params = launch.new_params()
    params.rows.bits, params.order = workspace.bits.address, workspace.order.address
    params.classes = workspace.classes.address
    launch.run(params)


@functools.lru_cache(maxsize=256)
def _order_rows_launch(problem: Problem, device: int) -> Launch:
    _, _, words, num_rows = _bits_shape(problem)
    rows = IndexBits(num_words=words, num_rows=num_rows, num_cols=problem.queries.num_blocks, group=problem.group)
    launcher = module.launcher(specialise.order_rows(), device)
    return Launch(OrderRowsParams(rows=rows), problem.batch * problem.keys.heads, launcher)


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
        q_ref, k_ref, v_ref, dout_ref = [(x.data_ptr(), x.stride()) for x in (q, k, v, dout)]
        sizes = sizes_ref(q_sizes), sizes_ref(kv_sizes)
        return cls(q.dtype, q.get_device(), q_ref, k_ref, v_ref, dout_ref, *sizes)


def backward_q(
    problem: Problem, operands: Operands, refs: _Refs, workspace: Workspace, of_means: Tensor | None = None
) -> Tensor:
    """dq; to it that of the block means is added, if there is one."""
    q2k_idx, q2k_num = operands.q2k_idx, operands.q2k_num
    dq = empty_like(operands.q)
    launch = _backward_q_launch(problem, refs, q2k_idx.shape[-1], dq.stride())
    params = launch.new_params()
    tables = tables_of(problem, dq)
    set_map(tables, params.schedule.rows, q2k_idx, q2k_num)
    tensors = params.q, params.k, params.v, params.dout
    _maps = launch.set_segments(tables, dq, (params.queries, params.keys), tensors)
    _set_gradient(params.dq, dq, of_means)
    params.statistics = workspace.statistics.address
    launch.run_work_tiles(params, dq, workspace.counters.address)
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
    params.dq.strides[:] = token_strides(dq_strides, queries.side)
    launcher = module.launcher(specialise.attend_backward_q(refs.dtype, problem.head_dim, has_segments), refs.device)
    return Launch.of_work_tiles(params, launcher, refs.device, maps=_maps_of(problem, refs))


def backward_kv(
    problem: Problem,
    operands: Operands,
    refs: _Refs,
    workspace: Workspace,
    of_k_means: Tensor | None = None,
    of_v_means: Tensor | None = None,
    sums: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """dk and dv, to which those of the block means are added, if there are any; where ``sums`` is given, the pass for
    all three, which adds dq to it."""
    dk, dv = empty_like(operands.k), empty_like(operands.v)
    launch = _backward_kv_launch(problem, refs, dk.stride(), dv.stride(), sums is not None)
    params = launch.new_params()
    tensors = params.q, params.k, params.v, params.dout
    _maps = launch.set_segments(tables_of(problem, dk), dk, (params.queries, params.keys), tensors)
    if sums is not None:
        params.dq = sums.data_ptr()
    rows = params.schedule.rows
    rows.bits, rows.order = workspace.bits.address, workspace.order.address
    _set_gradient(params.dk, dk, of_k_means)
    _set_gradient(params.dv, dv, of_v_means)
    params.statistics = workspace.statistics.address
    launch.run_work_tiles(params, dk, workspace.counters.address + WORD_BYTES)
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
    params.dk.strides[:] = token_strides(dk_strides, keys.side)
    params.dv.strides[:] = token_strides(dv_strides, keys.side)
    kernel = specialise.attend_backward_qkv if in_one_pass else specialise.attend_backward_kv
    launcher = module.launcher(kernel(refs.dtype, problem.head_dim, has_segments), refs.device)
    blocks_per_processor = 1 if in_one_pass else specialise.KV_THREAD_BLOCKS[problem.head_dim]
    return Launch.of_work_tiles(params, launcher, refs.device, blocks_per_processor, _maps_of(problem, refs))


def backward_qkv(
    problem: Problem,
    operands: Operands,
    lse: Tensor,
    refs: _Refs,
    workspace: Workspace,
    of_q_means: Tensor | None,
    of_k_means: Tensor | None,
    of_v_means: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    q, queries = operands.q, problem.queries
    # What is summed up of dq, see ``DqSums`` of ``backward.cuh``.
    sums = q.new_zeros((problem.batch, queries.heads, queries.length, problem.head_dim), dtype=torch.float32)
    dk, dv = backward_kv(problem, operands, refs, workspace, of_k_means, of_v_means, sums)
    dq = empty_like(q)
    _store_dq(problem, operands.q_sizes, sums, lse.contiguous(), dq, of_q_means)
    return dq, dk, dv


def _store_dq(
    problem: Problem, q_sizes: Tensor | None, sums: Tensor, lse: Tensor, dq: Tensor, of_means: Tensor | None
) -> None:
    launch = _store_dq_launch(problem, dq.dtype, dq.get_device(), sizes_ref(q_sizes), dq.stride())
    params = launch.new_params()
    launch.set_segments(tables_of(problem, dq), dq, [params.queries])
    params.sums, params.lse = sums.data_ptr(), lse.data_ptr()
    _set_gradient(params.dq, dq, of_means)
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
    params.dq.strides[:] = token_strides(dq_strides, queries)
    boxes = problem.batch * queries.heads * queries.num_blocks * (queries.block // BOX_TOKENS)
    return Launch(params, boxes, module.launcher(specialise.store_dq(dtype, problem.head_dim, has_segments), device))


def _set_gradient(to: GradientTensor, gradient: Tensor, of_means: Tensor | None) -> None:
    to.data = gradient.data_ptr()
    if of_means is not None:
        to.of_means = of_means.data_ptr()


def _tensors(queries: SideView, keys: SideView, refs: _Refs) -> list[Any]:
    """q, k, v and dout as TMA reads them."""
    tensors = ((queries, refs.q), (keys, refs.k), (keys, refs.v), (queries, refs.dout))
    return [side.tensor(tensor, refs.dtype, refs.device) for side, tensor in tensors]


def _maps_of(problem: Problem, refs: _Refs) -> SegmentMaps | None:
    queries, keys = problem.queries, problem.keys
    tensors = (queries, refs.q), (keys, refs.k), (keys, refs.v), (queries, refs.dout)
    return maps_of(problem, tensors, refs.dtype, refs.device)
