"""The launches of the forward but for the coarse branch: parameters, outputs, and what calls share."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from vsa_jit.backends.sm90 import specialise
from vsa_jit.backends.sm90.launch import (
    LOG2E,
    Launch,
    SideView,
    maps_of,
    persistent_blocks,
    set_coarse,
    set_map,
    tables_of,
    token_strides,
)
from vsa_jit.backends.sm90.layout import SizesRef, sizes_ref
from vsa_jit.backends.sm90.schedule import max_list_length, schedule_of
from vsa_jit.backends.sm90.structs import CONSUMERS, TileLists, structures
from vsa_jit.backends.sm90.tma import TensorRef, tensor_ref
from vsa_jit.jit import driver, module
from vsa_jit.problem import Operands, Problem, axes, empty_like


def block_means(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor | None, q_sizes: Tensor | None, kv_sizes: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    of_q, of_k = means_shapes(problem)
    q_c, k_c = q.new_empty(of_q, dtype=torch.float32), k.new_empty(of_k, dtype=torch.float32)
    v_c = None if v is None else torch.empty_like(k_c)
    launch_block_means(problem, (q, k, v), q_sizes, kv_sizes, (q_c, k_c, v_c))
    return q_c, k_c, v_c


def means_shapes(problem: Problem) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the block means of queries, and of keys."""
    sides = problem.queries, problem.keys
    of_q, of_k = [(problem.batch, side.heads, side.num_blocks, problem.head_dim) for side in sides]
    return of_q, of_k


def launch_block_means(
    problem: Problem,
    tensors: tuple[Tensor, Tensor, Tensor | None],
    q_sizes: Tensor | None,
    kv_sizes: Tensor | None,
    means: tuple[Any, Any, Any],
    counter: int | None = None,
) -> int:
    """``block_means`` to tensors, or to parts of an allocation.

    Args:
        counter: address of 32 bits that are 0 when the kernel starts, or None. Each warp that sums adds 1 when all its
            means of q and k are stored.

    Returns:
        What the counter comes to: how many warps have means of q or k.
    """
    q, k, v = tensors
    launch = _block_means_launch(
        problem, q.dtype, q.get_device(), *map(tensor_ref, (q, k, v)), *map(sizes_ref, (q_sizes, kv_sizes))
    )
    params = launch.new_params()
    for operand, mean in zip(params.operands, means, strict=True):
        operand.mean = None if mean is None else mean.data_ptr()
    params.done = counter
    mapped = [operand.tensor for operand in params.operands]
    _maps = launch.set_segments(tables_of(problem, q), q, params.layouts, mapped)
    launch.run(params)
    of_q, of_k, _ = params.operands
    return min(of_q.num_items + of_k.num_items, launch.blocks * specialise.MEANS_CONSUMERS)


@functools.lru_cache(maxsize=256)
def _block_means_launch(
    problem: Problem,
    dtype: torch.dtype,
    device: int,
    q: TensorRef,
    k: TensorRef,
    v: TensorRef | None,
    q_sizes: SizesRef | None,
    kv_sizes: SizesRef | None,
) -> Launch:
    has_segments = problem.queries.segments is not None
    params = structures(has_segments).BlockMeansParams()
    queries = SideView(problem, problem.queries, q_sizes, padded=False)
    keys = SideView(problem, problem.keys, kv_sizes, padded=kv_sizes is not None)
    box = problem.head_dim, driver.SWIZZLE_NONE
    tensors = []
    for operand, tensor, of in zip(params.operands, (q, k, v), (queries, keys, keys), strict=True):
        if tensor is not None:
            side = of.side
            tensors.append((side, tensor))
            operand.tensor = of.tensor(tensor, dtype, device, *box)
            operand.num_blocks, operand.heads = side.num_blocks, side.heads
            operand.num_items = problem.batch * side.heads * side.num_blocks
    params.layouts[:] = queries.layout(), keys.layout()
    _, head_axis, token_axis, _ = axes(problem.queries.layout)
    _, strides = q
    params.heads_first = strides[head_axis] < strides[token_axis]
    blocks = persistent_blocks(device, sum(operand.num_items for operand in params.operands))
    launcher = module.launcher(specialise.block_means(dtype, problem.head_dim, has_segments), device)
    return Launch(params, blocks, launcher, maps=maps_of(problem, tensors, dtype, device, *box))


def attend(problem: Problem, operands: Operands, keep_out_s: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    q, q2k_idx, q2k_num = operands.q, operands.q2k_idx, operands.q2k_num
    lse = q.new_empty((problem.batch, problem.queries.heads, problem.queries.length), dtype=torch.float32)
    operands = operands._replace(q2k_idx=q2k_idx.contiguous(), q2k_num=q2k_num.contiguous())
    out, out_s = launch_attend(problem, operands, keep_out_s, lse)
    return out, lse, out_s


def launch_attend(
    problem: Problem, operands: Operands, keep_out_s: bool, lse: Any, counter: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """``attend`` where the map, the coarse output and the log-sum-exp may be parts of an allocation.

    Args:
        counter: as ``Launch.run_work_tiles`` takes it.
    """
    q, k, v, q2k_idx, q2k_num, q_sizes, kv_sizes, *_ = operands
    out = empty_like(q)
    out_s = empty_like(q) if keep_out_s else None
    # Spelt out, which is quicker than a map: every call passes here.
    launch = _attend_launch(
        problem,
        q.dtype,
        q.get_device(),
        q2k_idx.shape[-1],
        tensor_ref(q),
        tensor_ref(k),
        tensor_ref(v),
        out.stride(),
        sizes_ref(q_sizes),
        sizes_ref(kv_sizes),
    )
    params = launch.new_params()
    tables = tables_of(problem, q)
    set_map(tables, params.schedule.rows, q2k_idx, q2k_num)
    _maps = launch.set_segments(tables, q, (params.queries, params.keys), (params.q, params.k, params.v))
    params.out, params.lse = out.data_ptr(), lse.data_ptr()
    if out_s is not None:
        params.out_s = out_s.data_ptr()
    _kept = set_coarse(params.coarse, problem, operands)
    launch.run_work_tiles(params, q, counter)
    return out, out_s


@functools.lru_cache(maxsize=256)
def _attend_launch(
    problem: Problem,
    dtype: torch.dtype,
    device: int,
    width: int,
    q: TensorRef,
    k: TensorRef,
    v: TensorRef,
    out_strides: tuple[int, ...],
    q_sizes: SizesRef | None,
    kv_sizes: SizesRef | None,
) -> Launch:
    queries = SideView(problem, problem.queries, q_sizes, padded=False)
    keys = SideView(problem, problem.keys, kv_sizes, padded=kv_sizes is not None)
    has_segments = problem.queries.segments is not None
    params = structures(has_segments).AttendForwardParams(
        q=queries.tensor(q, dtype, device),
        k=keys.tensor(k, dtype, device),
        v=keys.tensor(v, dtype, device),
        queries=queries.layout(),
        keys=keys.layout(),
        schedule=schedule_of(problem, width, device, CONSUMERS),
        lists=TileLists(length=max_list_length(queries.side, keys.side, width, CONSUMERS)),
        q_len=queries.side.length,
        scale_log2=problem.softmax_scale * LOG2E,
    )
    params.out_strides[:] = token_strides(out_strides, queries.side)
    launcher = module.launcher(specialise.attend_forward(dtype, problem.head_dim, has_segments), device)
    tensors = (queries.side, q), (keys.side, k), (keys.side, v)
    return Launch.of_work_tiles(params, launcher, device, maps=maps_of(problem, tensors, dtype, device))
