"""Which key blocks each query block attends: by the scores of block means, which are attended themselves, or by a map.

These operators see no tokens. Everything follows from the block means, so that whoever shards a sequence can gather
those between the pooling and the selection.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vsa_jit import flops
from vsa_jit.backends.base import Backend
from vsa_jit.backends.choose import selection_backend_for
from vsa_jit.fastpath import softmax_backward
from vsa_jit.operators import Operator, save_tensors, tangent_or_zeros
from vsa_jit.problem import contiguous_like

# Scores of block means that are computed at a time, so that they need little memory however many blocks there are.
SCORES_AT_A_TIME = 1 << 24


@Operator
def coarse_attend(
    q_c: Tensor,
    k_c: Tensor,
    v_c: Tensor | None,
    kv_sizes: Tensor | None,
    topk: int,
    selection_dtype: torch.dtype,
    softmax_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Chooses the key blocks of each query block by the scores of their means, and attends the means.

    All arithmetic is in fp32, whatever precision PyTorch is allowed for its own products. With a narrower
    ``selection_dtype`` each result is rounded to it: the means, their products, the scaled scores, by which blocks are
    then chosen, the probabilities and the output. The rounding happens in here because ``torch.compile`` drops
    conversions to a narrower dtype and back. Derivatives are those of the unrounded operations at the rounded values.

    Args:
        q_c: block means of the queries, fp32 [B, H, n_q, D].
        k_c, v_c: of the keys and values, fp32 [B, H_kv, n_k, D]; v_c None where the means are not attended.
        kv_sizes: valid tokens of each key block; one without any is neither selected nor attended.
        topk: key blocks to select for each query block, clamped to n_k.

    Returns:
        ``(out_c, q2k_idx, q2k_num)``: fp32 [B, H, n_q, D], softmax(q_c k_cᵀ · scale) v_c, empty without v_c; int32
        [B, H, n_q, topk], the blocks of highest score q_c · k_c, ties to the lower, ascending, 0 past the number
        selected; int32 [B, H, n_q]. The selection carries no derivative.
    """
    run = selection_backend_for("coarse_attend", backend, q_c.device)
    # A program that was traced with a longer sequence may ask for more.
    topk = min(topk, k_c.shape[2])
    outs, indices, numbers = [], [], []
    for q_rows, k_rows, v_rows in _scored_at_a_time(*_rounded_means(selection_dtype, q_c, k_c, v_c)):
        scores = _scores(run, q_rows, k_rows, softmax_scale, selection_dtype)
        idx, num = run.select(scores, kv_sizes, topk)
        indices.append(idx)
        numbers.append(num)
        if v_rows is not None:
            p = _softmax(scores, kv_sizes, softmax_scale, selection_dtype)
            outs.append(_round_to(selection_dtype, run.matmul(p, v_rows)))
    rows = q_c.shape[:3]
    out_c = q_c.new_empty(0) if v_c is None else _joined(outs, q_c.shape)
    return out_c, _joined(indices, (*rows, topk)), _joined(numbers, rows)


@coarse_attend.fake
def _(q_c, k_c, v_c, kv_sizes, topk, *_):
    most = k_c.shape[2]
    topk = min(topk, most) if isinstance(topk, int) and isinstance(most, int) else topk
    return (
        q_c.new_empty(0 if v_c is None else q_c.shape),
        q_c.new_empty((*q_c.shape[:3], topk), dtype=torch.int32),
        q_c.new_empty(q_c.shape[:3], dtype=torch.int32),
    )


def _scored_at_a_time(q_c: Tensor, k_c: Tensor, *others: Tensor | None) -> Iterator[list[Any]]:
    """Some key/value heads at a time: of each [B, heads, blocks, D] the part that belongs to them, [rows, ..., D].

    The query heads of one key/value head are rows of one product.
    """
    batch, kv_heads, num_kv_blocks, _ = k_c.shape
    rows = batch * kv_heads
    scores = q_c.shape[1] // kv_heads * q_c.shape[2] * num_kv_blocks
    step = max(1, SCORES_AT_A_TIME // scores)
    flat = [None if x is None else x.reshape(rows, -1, x.shape[3]) for x in (q_c, k_c, *others)]
    for start in range(0, rows, step):
        yield [None if x is None else x[start : start + step] for x in flat]


def _joined(parts: list[Tensor], shape: Sequence[int]) -> Tensor:
    """The results of ``_scored_at_a_time`` in one tensor; where all were scored at once, without a copy."""
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(shape)


def _round_to(dtype: torch.dtype, x: Tensor) -> Tensor:
    """Rounds an fp32 tensor to the values of a dtype, in place."""
    return x if dtype == x.dtype else x.copy_(x.to(dtype))


def _rounded_means(dtype: torch.dtype, *means: Tensor | None) -> list[Any]:
    return [x if x is None else x.to(dtype).float() for x in means]


def _scores(run: Backend, q_rows: Tensor, k_rows: Tensor, softmax_scale: float, selection_dtype: torch.dtype) -> Tensor:
    """The scores that order the key blocks: fp32 before scaling, a narrower dtype after, since its scaling can tie."""
    scores = run.matmul(q_rows, k_rows.mT)
    if selection_dtype == torch.float32:
        return scores
    return _round_to(selection_dtype, _round_to(selection_dtype, scores).mul_(softmax_scale))


def _softmax(scores: Tensor, kv_sizes: Tensor | None, softmax_scale: float, selection_dtype: torch.dtype) -> Tensor:
    """Probabilities of the key blocks, from ``_scores``, which are overwritten."""
    if selection_dtype == torch.float32:
        scores.mul_(softmax_scale)
    if kv_sizes is not None:
        empty = kv_sizes < 1
        # Where all blocks are empty, all of them hold a mean of 0: attending those gives the 0 that is wanted.
        scores.masked_fill_(empty & ~empty.all(), float("-inf"))
    return _round_to(selection_dtype, scores.softmax(-1))


@Operator
def coarse_attend_backward(
    q_c: Tensor,
    k_c: Tensor,
    v_c: Tensor,
    kv_sizes: Tensor | None,
    dout_c: Tensor,
    selection_dtype: torch.dtype,
    softmax_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the output of ``coarse_attend`` in q_c, k_c and v_c."""
    run = selection_backend_for("coarse_attend_backward", backend, q_c.device)
    dq_c, dk_c, dv_c = [], [], []
    means = _rounded_means(selection_dtype, q_c, k_c, v_c)
    for q_rows, k_rows, v_rows, dout_rows in _scored_at_a_time(*means, dout_c.contiguous()):
        scores = _scores(run, q_rows, k_rows, softmax_scale, selection_dtype)
        p = _softmax(scores, kv_sizes, softmax_scale, selection_dtype)
        dv_c.append(run.matmul(p.mT, dout_rows))
        dp = run.matmul(dout_rows * softmax_scale, v_rows.mT)
        ds = softmax_backward(dp, p, -1, torch.float32)
        dq_c.append(run.matmul(ds, k_rows))
        dk_c.append(run.matmul(ds.mT, q_rows))
    return _joined(dq_c, q_c.shape), _joined(dk_c, k_c.shape), _joined(dv_c, v_c.shape)


@coarse_attend_backward.fake
def _(q_c, k_c, v_c, *_):
    return contiguous_like(q_c), contiguous_like(k_c), contiguous_like(v_c)


@Operator
def coarse_attend_tangent(
    q_c: Tensor,
    k_c: Tensor,
    v_c: Tensor,
    q_c_t: Tensor,
    k_c_t: Tensor,
    v_c_t: Tensor,
    kv_sizes: Tensor | None,
    selection_dtype: torch.dtype,
    softmax_scale: float,
    backend: str,
) -> Tensor:
    """The tangent of the output of ``coarse_attend`` along those of q_c, k_c and v_c."""
    run = selection_backend_for("coarse_attend_tangent", backend, q_c.device)
    out_t = []
    means = _rounded_means(selection_dtype, q_c, k_c, v_c)
    for q_rows, k_rows, v_rows, q_t, k_t, v_t in _scored_at_a_time(*means, q_c_t, k_c_t, v_c_t):
        scores = _scores(run, q_rows, k_rows, softmax_scale, selection_dtype)
        p = _softmax(scores, kv_sizes, softmax_scale, selection_dtype)
        scores_t = (run.matmul(q_t, k_rows.mT) + run.matmul(q_rows, k_t.mT)) * softmax_scale
        p_t = p * (scores_t - (p * scores_t).sum(-1, keepdim=True))
        out_t.append(run.matmul(p_t, v_rows) + run.matmul(p, v_t))
    return _joined(out_t, q_c.shape)


@coarse_attend_tangent.fake
def _(q_c, *_):
    return contiguous_like(q_c)


def _setup_coarse_attend(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    tensors, (_, *ctx.static) = inputs[:4], inputs[4:]
    v_c = tensors[2]
    ctx.mark_non_differentiable(*(output if v_c is None else output[1:]))
    save_tensors(ctx, *tensors)


def _coarse_attend_grad(ctx: Any, dout_c: Tensor | None, *_: None) -> tuple:
    if dout_c is None:
        return (None,) * 8
    grads = coarse_attend_backward(*ctx.saved_tensors, dout_c, *ctx.static)
    return *grads, *(None,) * 5


def _coarse_attend_jvp(
    ctx: Any, saved: Sequence[Any], q_t: Tensor | None, k_t: Tensor | None, v_t: Tensor | None, *_: None
) -> tuple:
    q_c, k_c, v_c, kv_sizes = saved
    if v_c is None:
        return None, None, None
    tangents = (tangent_or_zeros(x_t, x) for x_t, x in ((q_t, q_c), (k_t, k_c), (v_t, v_c)))
    return coarse_attend_tangent(q_c, k_c, v_c, *tangents, kv_sizes, *ctx.static), None, None


coarse_attend.differentiate(_setup_coarse_attend, _coarse_attend_grad, _coarse_attend_jvp)
coarse_attend_backward.differentiate_once()
coarse_attend_tangent.differentiate_once()

coarse_attend.count_flops(flops.coarse_attend)
coarse_attend_backward.count_flops(flops.coarse_attend_backward)
coarse_attend_tangent.count_flops(flops.coarse_attend_tangent)


@Operator
def map_to_indices(block_map: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """The set columns of each row of a bool map [B, H, n_q, n_k] as ``(q2k_idx, q2k_num)``: int32 [B, H, n_q, n_k],
    ascending, 0 past the number set; int32 [B, H, n_q]."""
    run = selection_backend_for("map_to_indices", backend, block_map.device)
    return run.map_to_indices(block_map)


@map_to_indices.fake
def _(block_map, backend):
    return (
        block_map.new_empty(block_map.shape, dtype=torch.int32),
        block_map.new_empty(block_map.shape[:3], dtype=torch.int32),
    )
