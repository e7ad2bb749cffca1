"""The public functions: check → select → attend → combine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from vsa_jit.backends.choose import NAMES, Choice, choose
from vsa_jit.checks import (
    check_block_map,
    check_choice,
    check_context,
    check_gate,
    check_indices,
    check_problem,
    check_selection_dtype,
    check_several_topk,
    check_topk_of_samples,
)
from vsa_jit.fastpath import CallCache, are_plain, can_bypass_dispatcher, needs_gradient
from vsa_jit.grid import block_tokens
from vsa_jit.operators import Operator
from vsa_jit.ops import video
from vsa_jit.ops.attention import attend
from vsa_jit.ops.selection import map_to_indices
from vsa_jit.problem import BackendName, Context, Layout, Problem, SegmentList

# Settings of a call that say how its tokens lie, by the names of ``_check``.
_Order: TypeAlias = dict[str, Any]

_known_calls: CallCache[_Call] = CallCache()


def video_sparse_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    variable_block_sizes: Tensor | None = None,
    q_variable_block_sizes: Tensor | None = None,
    topk: int | Sequence[int] | None = None,
    block_size: int | Sequence[int] = 64,
    compress_attn_weight: Tensor | float | None = None,
    *,
    sparsity: float | Sequence[float] | None = None,
    grid: Sequence[int] | None = None,
    segments: SegmentList | None = None,
    context: Context = "attend",
    layout: Layout = "bhsd",
    softmax_scale: float | None = None,
    selection_dtype: torch.dtype | None = None,
    backend: BackendName = "auto",
) -> Tensor:
    """Video Sparse Attention (arXiv 2505.13389): block means choose the key blocks that each query block attends.

    ``out = compress_attn_weight · softmax(q_c k_cᵀ · scale) v_c + attention over the topk best key blocks``, where
    ``q_c, k_c, v_c`` are the means of the valid tokens of each block. The choice of blocks carries no gradient.
    Forward-mode derivatives (``torch.func.jvp``) are computed on the backend ``torch`` alone; on another, and where
    derivatives are differentiated again, ``NotImplementedError`` is raised.

    Args:
        q: [B, H, S_q, D] (or [B, S_q, H, D], see ``layout``), bf16, fp16 or fp32, D from 16 to 256; the last dimension
            contiguous, the others of any stride.
        k, v: [B, H_kv, S_k, D] of q's dtype; H a multiple of H_kv.
        variable_block_sizes: int32 or int64 [n_k], valid tokens of each key block, which come first in it; the sequence
            is then blocks padded to full size. Values are clamped to 0 … block. None: every token is valid.
        q_variable_block_sizes: the same for queries, [n_q]. None: the same as ``variable_block_sizes`` where S_q equals
            S_k (self-attention), else every token is valid.
        topk: key blocks to attend for each query block, at least 1; clamped to n_k.
        block_size: tokens of a block, a multiple of 64, or a video tile (t, h, w) of so many. With ``grid`` an int
            means 64 → (4,4,4), 128 → (2,8,8), 256 → (4,8,8).
        compress_attn_weight: weight of the coarse output: a tensor of q's shape (or broadcastable to it), a float, None
            for 1. The float 0.0 drops the coarse output and its cost.
        sparsity: instead of ``topk``, the share of key blocks to leave out, in [0, 1).
        grid: (T, H, W) of a video whose tokens come in raster order, w fastest: any size, nothing is padded or copied.
        segments: where the sequence is more than one video, what follows each other in it: the number of plain tokens
            (text, audio, condition frames), which are context, or the grid (T, H, W) of a video, such as
            ``[77, (21, 30, 52)]``; each may have no tokens. Blocks never straddle two segments. A list of such lists is
            several samples in one row, none of which attends another: ``[[77, (21, 30, 52)], [0, (9, 30, 52)]]``.
            ``topk`` and ``sparsity`` then count blocks of video, in each sample, and may be lists with one value for
            each. Queries of context attend their whole sample. ``grid=g`` is short for ``segments=[g]``.
        context: "attend": queries of video attend all context of their sample beside their ``topk`` blocks of video;
            "compete": they attend as many blocks, those of highest score among video and context.
        layout: "bhsd" or "bshd", of q, k, v, the weight and the output.
        softmax_scale: 1/sqrt(D) if None.
        selection_dtype: in which the coarse branch computes; None for fp32. With bf16 or fp16 it rounds, each time to
            nearest, the block means (summed in fp32), their products (accumulated in fp32), the products times the
            scale, by which blocks are then chosen, the probabilities and ``out_c``: what FastVideo does with inputs of
            that dtype, so that a model trained with it selects the same blocks. In fp16 a product beyond 65,504, before
            the scale, is infinite, and the output of its query block then NaN. Gradients are those of the unrounded
            operations at the rounded values.
        backend: "auto", or the name of the one that must run.

    Returns:
        Of q's shape and dtype. Tokens that are not valid get 0.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what was expected and what came.
        RuntimeError: the backend asked for cannot run this call.
    """
    gate = compress_attn_weight if isinstance(compress_attn_weight, Tensor) else None
    sizes = variable_block_sizes, q_variable_block_sizes
    order: _Order = {
        "block_size": block_size,
        "grid": grid,
        "segments": segments,
        "layout": layout,
        "softmax_scale": softmax_scale,
        "backend": backend,
    }
    # A dtype is no plain value. Its name in quotes, which would be wrong, is told apart.
    dtype_name = None if selection_dtype is None else repr(selection_dtype)
    weight = compress_attn_weight if gate is None else "tensor"
    key = _key_of("video_sparse_attn", (topk, sparsity, weight, context, dtype_name), order, sizes, q, k, v, gate)
    call = _known_call(key)
    if call is None:
        problem = _check(q, k, v, *sizes, **order)
        of_samples = check_topk_of_samples(topk, sparsity, segments, problem.keys)
        compete = check_context(context, segments)
        checked = check_gate(compress_attn_weight, q)
        gate, gate_value = (checked, 0.0) if isinstance(checked, Tensor) else (None, checked)
        dtype = check_selection_dtype(selection_dtype)
        call = _remember(key, _Call(video.video_sparse_attn, problem, (gate_value, of_samples, compete, dtype, False)))
    elif gate is not None and gate.shape != q.shape:
        gate = gate.expand(q.shape)
    kv_sizes, q_sizes = map(_contiguous, sizes)
    tensors = q, k, v, gate, _sizes_of_queries(call.problem, q_sizes, kv_sizes), kv_sizes
    if call.is_direct:
        return video.run_directly(call.problem, backend, call.numbers, call.is_recorded, *tensors)
    return call.run(backend, *tensors)[0]


def block_sparse_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: Tensor,
    variable_block_sizes: Tensor | None = None,
    *,
    q_variable_block_sizes: Tensor | None = None,
    block_size: int | Sequence[int] = 64,
    grid: Sequence[int] | None = None,
    segments: SegmentList | None = None,
    layout: Layout = "bhsd",
    softmax_scale: float | None = None,
    backend: BackendName = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of each query block over the key blocks that a map names.

    Args:
        block_map: bool [B, H, n_q, n_k], or what broadcasts to it: whether the query block attends the key block.

    The other arguments are those of ``video_sparse_attn``, but for one: where ``q_variable_block_sizes`` is None every
    query token is valid, whatever the sizes of the key blocks. With ``segments`` blocks are numbered in their order,
    and the map alone says what is attended, context and other samples too.

    Returns:
        ``(out, lse)``: out of q's shape and dtype; lse fp32 [B, H, S_q], the natural-log log-sum-exp of the scaled
        scores. A query without keys gets 0 and -inf.
    """
    sizes = variable_block_sizes, q_variable_block_sizes
    order: _Order = {
        "block_size": block_size,
        "grid": grid,
        "segments": segments,
        "layout": layout,
        "softmax_scale": softmax_scale,
        "backend": backend,
    }
    key = _key_of("block_sparse_attn", (), order, sizes, q, k, v, block_map)
    call = _known_call(key)
    if call is None:
        problem = _check(q, k, v, *sizes, **order)
        check_block_map(block_map, problem, q.device)
        call = _remember(key, _Call(attend, problem))
    q2k_idx, q2k_num = map_to_indices(block_map.expand(call.problem.map_shape), backend)
    kv_sizes, q_sizes = map(_contiguous, sizes)
    return call.run(backend, q, k, v, q2k_idx, q2k_num, q_sizes, kv_sizes)


def block_sparse_attn_from_indices(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q2k_idx: Tensor,
    q2k_num: Tensor,
    variable_block_sizes: Tensor | None = None,
    *,
    q_variable_block_sizes: Tensor | None = None,
    block_size: int | Sequence[int] = 64,
    grid: Sequence[int] | None = None,
    segments: SegmentList | None = None,
    layout: Layout = "bhsd",
    softmax_scale: float | None = None,
    backend: BackendName = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of each query block over the key blocks that indices name.

    Args:
        q2k_idx: int32 or int64 [B, H, n_q, m] for any m: key blocks of each query block, in any order, each at most
            once.
        q2k_num: int32 or int64 [B, H, n_q], how many of the m entries count; the others are ignored. Clamped to 0 … m.

    The other arguments are those of ``block_sparse_attn``. Indices cannot be checked without waiting for the GPU: a
    query block that names a key block outside 0 … n_k - 1 gets NaN, and nothing outside the tensors is read.

    Returns:
        ``(out, lse)``, as ``block_sparse_attn``.
    """
    sizes = variable_block_sizes, q_variable_block_sizes
    order: _Order = {
        "block_size": block_size,
        "grid": grid,
        "segments": segments,
        "layout": layout,
        "softmax_scale": softmax_scale,
        "backend": backend,
    }
    key = _key_of("block_sparse_attn_from_indices", (), order, sizes, q, k, v, q2k_idx, q2k_num)
    call = _known_call(key)
    if call is None:
        problem = _check(q, k, v, *sizes, **order)
        idx, num = check_indices(q2k_idx, q2k_num, problem, q.device)
        call = _Call(attend, problem)
        if idx is q2k_idx and num is q2k_num:
            call = _remember(key, call)
        q2k_idx, q2k_num = idx, num
    kv_sizes, q_sizes = map(_contiguous, sizes)
    return call.run(backend, q, k, v, q2k_idx, q2k_num, q_sizes, kv_sizes)


@torch.no_grad()
def recall(
    q: Tensor,
    k: Tensor,
    variable_block_sizes: Tensor | None = None,
    q_variable_block_sizes: Tensor | None = None,
    *,
    topk: Sequence[int | Sequence[int]] | None = None,
    sparsity: Sequence[float | Sequence[float]] | None = None,
    block_size: int | Sequence[int] = 64,
    grid: Sequence[int] | None = None,
    segments: SegmentList | None = None,
    context: Context = "attend",
    layout: Layout = "bhsd",
    softmax_scale: float | None = None,
    selection_dtype: torch.dtype | None = None,
    backend: BackendName = "auto",
) -> Tensor:
    """How much of dense attention's probability falls on the key blocks that ``video_sparse_attn`` would select.

    1 where nothing is lost, and ``topk / n_k`` where the selection does no better than chance. For one query it is
    exp(lse of the selected keys - lse of all keys), which takes as long as a dense attention, and no matrix of tokens
    by tokens.

    Args:
        topk: several numbers of key blocks, each as in ``video_sparse_attn``.
        sparsity: instead of ``topk``, several shares of key blocks to leave out.

    The other arguments are those of ``video_sparse_attn``.

    Returns:
        fp32 [B, H, m], the mean over the valid queries of each head, for each of the m values; with segments over the
        queries of videos, since those of context attend everything: 0 where there are none. It has no gradient.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what was expected and what came.
        RuntimeError: the backend asked for cannot run this call.
    """
    problem = _check(
        q,
        k,
        k,
        variable_block_sizes,
        q_variable_block_sizes,
        block_size=block_size,
        grid=grid,
        segments=segments,
        layout=layout,
        softmax_scale=softmax_scale,
        backend=backend,
    )
    selection_dtype = check_selection_dtype(selection_dtype)
    counts = check_several_topk(topk, sparsity, segments, problem.keys)
    compete = check_context(context, segments)
    kv_sizes, q_sizes = _contiguous(variable_block_sizes), _contiguous(q_variable_block_sizes)
    q_sizes = _sizes_of_queries(problem, q_sizes, kv_sizes)

    def log_sum_exp(topk: list[int]) -> Tensor:
        numbers = topk, compete, selection_dtype
        q2k_idx, q2k_num = video.select_key_blocks(q, k, q_sizes, kv_sizes, *numbers, *problem.static, backend)
        _, lse = attend(q, k, k, q2k_idx, q2k_num, q_sizes, kv_sizes, *problem.static, backend)
        return lse

    of_all = log_sum_exp(check_topk_of_samples(None, 0.0, segments, problem.keys))
    is_valid = torch.ones(problem.queries.length, dtype=torch.bool, device=q.device)
    if q_sizes is not None:
        is_valid = (block_tokens(problem.queries, q_sizes, q.device) >= 0).flatten()
    if problem.queries.segments is not None:
        for segment in problem.queries.segments.segments:
            is_valid[segment.first_token : segment.first_token + segment.length] = segment.grid is not None
    # Where there are no keys at all, none of their probability is found.
    is_valid = is_valid & (of_all != float("-inf"))
    num_valid = is_valid.sum(-1).clamp(min=1)
    shares = [torch.where(is_valid, (log_sum_exp(count) - of_all).exp(), 0.0).sum(-1) / num_valid for count in counts]
    return torch.stack(shares, dim=-1).clamp(max=1.0)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    variable_block_sizes: Tensor | None = None,
    q_variable_block_sizes: Tensor | None = None,
    topk: int | Sequence[int] | None = None,
    block_size: int | Sequence[int] = 64,
    compress_attn_weight: Tensor | float | None = None,
    *,
    sparsity: float | Sequence[float] | None = None,
    grid: Sequence[int] | None = None,
    segments: SegmentList | None = None,
    context: Context = "attend",
    layout: Layout = "bhsd",
    softmax_scale: float | None = None,
    selection_dtype: torch.dtype | None = None,
    backend: BackendName = "auto",
) -> Choice:
    """Which backend and engine would run this call of ``video_sparse_attn``, and why each other one would not.

    Takes the arguments of ``video_sparse_attn``; ``topk`` and ``sparsity`` may both be left out. Computes nothing.

    Returns:
        A record with ``backend``, ``engine``, ``reasons`` (name → why not) and ``runners`` (operator → the backend that
        runs it: a backend may leave some operators to another one). Printed, it is a line for what runs and one for
        each reason, such as ``runs: sm90 (engine: nvrtc); single steps: triton``.
    """
    problem = _check(
        q,
        k,
        v,
        variable_block_sizes,
        q_variable_block_sizes,
        block_size=block_size,
        grid=grid,
        segments=segments,
        layout=layout,
        softmax_scale=softmax_scale,
        backend=backend,
    )
    if topk is not None or sparsity is not None:
        check_topk_of_samples(topk, sparsity, segments, problem.keys)
    check_context(context, segments)
    check_gate(compress_attn_weight, q)
    check_selection_dtype(selection_dtype)
    return choose(problem, backend, q.device, q.dtype, (q, k, v))


def warmup(
    arch: str | None = None,
    *,
    dtype: torch.dtype | Sequence[torch.dtype] | None = None,
    head_dim: int | Sequence[int] | None = None,
    block_size: int | Sequence[int] | Sequence[int | Sequence[int]] | None = None,
    segments: bool | None = None,
    engine: str = "auto",
) -> list[Path]:
    """Compiles this package's CUDA kernels ahead of time and keeps them, so that no later call compiles.

    With a GPU of the architecture in the machine they are also loaded on the current device, as a CUDA graph needs it.
    Triton's kernels are compiled at the first call that needs them, whatever was warmed up.

    Args:
        arch: "9.0a" for Hopper GPUs, with or without one here. None: that of the current GPU; where that is none that
            has CUDA kernels in this package, nothing is compiled.
        dtype: torch.bfloat16, torch.float16 or several; None for both.
        head_dim: 64, 128 or several; None for both.
        block_size: as in ``video_sparse_attn``, or a list of such; None for all. Blocks of 128 tokens and more share
            their kernels, of which blocks of 64 need fewer.
        segments: True for the kernels of calls with ``segments``, False for those of other calls, None for both.
        engine: "nvrtc", "nvcc" or "auto".

    Returns:
        The folder of each kernel.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it and lists what is allowed.
        vsa_jit.CompileError: a kernel does not compile.
        RuntimeError: there is nothing to compile with, or the result is for another machine and there is no folder to
            keep it in; the message says why. Where the GPU is here, the kernels are ready for this process in any case.
    """
    from vsa_jit.backends import warmup

    return warmup.warmup(arch, dtype, head_dim, block_size, segments, engine)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    variable_block_sizes: Tensor | None,
    q_variable_block_sizes: Tensor | None,
    *,
    block_size: int | Sequence[int],
    grid: Sequence[int] | None,
    segments: SegmentList | None,
    layout: str,
    softmax_scale: float | None,
    backend: str,
) -> Problem:
    """The record of the call."""
    check_choice("backend", backend, NAMES)
    return check_problem(
        q,
        k,
        v,
        block_size=block_size,
        grid=grid,
        segments=segments,
        layout=layout,
        softmax_scale=softmax_scale,
        variable_block_sizes=variable_block_sizes,
        q_variable_block_sizes=q_variable_block_sizes,
    )


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _sizes_of_queries(problem: Problem, q_sizes: Tensor | None, kv_sizes: Tensor | None) -> Tensor | None:
    """The sizes of query blocks where block means select: in self-attention those of the keys, if none were given."""
    if q_sizes is not None or kv_sizes is None:
        return q_sizes
    # Only here are the lengths compared: an exported program is bound to the result.
    return kv_sizes if problem.queries.length == problem.keys.length else None


class _Call(NamedTuple):
    """A call that was checked: an operator, and what it is told besides tensors.

    Attributes:
        is_direct: nobody but kernels has to see it; ``is_recorded`` then says whether it needs a gradient.
    """

    operator: Operator
    problem: Problem
    numbers: tuple = ()
    is_direct: bool = False
    is_recorded: bool = False

    def run(self, backend: str, *tensors: Tensor | None) -> Any:
        args = (*tensors, *self.numbers, *self.problem.static, backend)
        return self.operator.call_directly(self.is_recorded, *args) if self.is_direct else self.operator(*args)


def _key_of(
    name: str,
    numbers: tuple,
    order: _Order,
    sizes: tuple[Tensor | None, Tensor | None],
    *tensors: Tensor | None,
) -> tuple[tuple, list[Tensor]]:
    """What calls that look alike have in common: settings, and tensors, each once.

    Args:
        sizes: of key blocks, and of query blocks.
    """
    kv_sizes, q_sizes = sizes
    which = kv_sizes is None, q_sizes is None, q_sizes is kv_sizes
    given = [x for x in (*tensors, kv_sizes, None if q_sizes is kv_sizes else q_sizes) if x is not None]
    return (name, *numbers, *order.values(), *which), given


def _known_call(key: tuple[tuple, list[Tensor]]) -> _Call | None:
    """What is known of a call that looks like an earlier one, whose checks would take longer than its launches."""
    return _known_calls.find(*key) if can_bypass_dispatcher() else None


def _remember(key: tuple[tuple, list[Tensor]], call: _Call) -> _Call:
    """Keeps a call for all that look like it; not where somebody else has to see it, or it computes nothing.

    The first one takes the same way as the others: activation checkpointing counts what each of them saves.
    """
    _, tensors = key
    if not can_bypass_dispatcher() or call.problem.batch == 0 or not are_plain(tensors):
        return call
    call = call._replace(is_direct=True, is_recorded=needs_gradient(tensors))
    _known_calls.keep(*key, call)
    return call
