"""Which key blocks each query block attends: by the scores of block means, which are attended themselves, or by a map.

These operators see no tokens. Everything follows from the block means, so that whoever shards a sequence can gather
those between the pooling and the selection.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vsa_jit import flops
from vsa_jit.backends.base import Backend
from vsa_jit.backends.choose import selection_backend_for
from vsa_jit.fastpath import softmax_backward
from vsa_jit.operators import Operator, save_tensors, tangent_or_zeros
from vsa_jit.problem import contiguous_like
from vsa_jit.segments import (
    Segments,
    listed_width,
    order_of,
    selection_rows,
    selection_width,
)
from vsa_jit.tables import on_device

# Scores of block means that are computed at a time, so that they need little memory however many blocks there are.
SCORES_AT_A_TIME = 1 << 24


@Operator
def coarse_attend(
    q_c: Tensor,
    k_c: Tensor,
    v_c: Tensor | None,
    kv_sizes: Tensor | None,
    topk: Sequence[int],
    compete: bool,
    selection_dtype: torch.dtype,
    tile: Sequence[int],
    segments: Sequence[int] | None,
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
        topk: key blocks to select for each query block, clamped to n_k. With segments, key blocks of video, one number
            for each sample.
        compete: whether blocks of context have to be among those of highest score, as many more; else all are selected.
        tile, segments: those of ``Problem.static``, which say what the blocks are.

    Returns:
        ``(out_c, q2k_idx, q2k_num)``: fp32 [B, H, n_q, D], softmax(q_c k_cᵀ · scale) v_c over the key blocks of the
        sample, empty without v_c; int32 [B, H, n_q, m], the blocks of highest score q_c · k_c, ties to the lower,
        ascending, 0 past the number selected; int32 [B, H, n_q], or -c where a query block of context attends all c
        blocks of its sample, the first of which is the only one named. The selection carries no derivative.
    """
    run = selection_backend_for("coarse_attend", backend, q_c.device)
    products = Products.of(run, tile, segments)
    # A program that was traced with a longer sequence may ask for more.
    topk = [min(count, k_c.shape[2]) for count in topk]
    outs, indices, numbers = [], [], []
    for q_rows, k_rows, v_rows in _scored_at_a_time(products, *_rounded_means(selection_dtype, q_c, k_c, v_c)):
        scores = _scores(products, q_rows, k_rows, softmax_scale, selection_dtype)
        idx, num = products.select(scores, kv_sizes, topk, compete)
        indices.append(idx)
        numbers.append(num)
        if v_rows is not None:
            p = _softmax(scores, kv_sizes, softmax_scale, selection_dtype)
            outs.append(_round_to(selection_dtype, products.over_blocks(p, v_rows)))
    rows_of_blocks = q_c.shape[:3]
    out_c = q_c.new_empty(0) if v_c is None else _joined(outs, q_c.shape)
    return out_c, _joined(indices, (*rows_of_blocks, -1)), _joined(numbers, rows_of_blocks)


@coarse_attend.fake
def _(q_c, k_c, v_c, kv_sizes, topk, compete, selection_dtype, tile, segments, *_):
    order = order_of(segments, _triple(tile))
    if order.segments is not None:
        width = selection_width(order.segments, topk)
    else:
        width, most = topk[0], k_c.shape[2]
        width = min(width, most) if isinstance(width, int) and isinstance(most, int) else width
    return (
        q_c.new_empty(0 if v_c is None else q_c.shape),
        q_c.new_empty((*q_c.shape[:3], width), dtype=torch.int32),
        q_c.new_empty(q_c.shape[:3], dtype=torch.int32),
    )


def _triple(tile: Sequence[int]) -> tuple[int, int, int]:
    return tile[0], tile[1], tile[2]


def _selection_rows(segments: Segments, topk: Sequence[int], compete: bool, device: torch.device) -> Tensor:
    key = "selection", segments, tuple(topk), compete
    return on_device(key, device, lambda: selection_rows(segments, topk, compete))


class Products(NamedTuple):
    """Products of block means and the selection by them, which never reach from one sample into another: not even a NaN
    does.

    Attributes:
        segments: None where all blocks belong to one sample that has no context.
    """

    run: Backend
    segments: Segments | None

    @classmethod
    def of(cls, run: Backend, tile: Sequence[int], segments: Sequence[int] | None) -> "Products":
        return cls(run, order_of(segments, _triple(tile)).segments)

    @property
    def several_samples(self) -> Segments | None:
        """The segments, where they are of several samples."""
        return self.segments if self.segments is not None and len(self.segments.samples) > 1 else None

    def of_blocks(self, a: Tensor, b: Tensor, between_samples: float = 0.0) -> Tensor:
        """a · b for each pair of blocks: [R, n_q, D] and [R, D, n_k]; a number where they are of different samples."""
        several = self.several_samples
        return self.run.matmul(a, b) if several is None else self.run.matmul_of_samples(a, b, several, between_samples)

    def over_blocks(self, a: Tensor, b: Tensor) -> Tensor:
        """a · b, which sums over the blocks of a sample: [R, n, n_k] and [R, n_k, D]."""
        several = self.several_samples
        return self.run.matmul(a, b) if several is None else self.run.matmul_over_samples(a, b, several)

    def select(
        self, scores: Tensor, kv_sizes: Tensor | None, topk: Sequence[int], compete: bool
    ) -> tuple[Tensor, Tensor]:
        """``(q2k_idx, q2k_num)`` as ``coarse_attend`` gives them, of ``of_blocks``: int32 [R, n_q, m] and [R, n_q]."""
        if self.segments is None:
            return self.run.select(scores, kv_sizes, topk[0])
        rows = _selection_rows(self.segments, topk, compete, scores.device)
        return self.run.select_in_samples(scores, rows, selection_width(self.segments, topk))


def _scored_at_a_time(products: Products, q_c: Tensor, k_c: Tensor, *others: Tensor | None) -> Iterator[list[Any]]:
    """Some key/value heads at a time: of each [B, heads, blocks, D] the part that belongs to them, [rows, ..., D].

    The query heads of one key/value head are rows of one product; of several samples each has products of its own.
    """
    batch, kv_heads, num_kv_blocks, _ = k_c.shape
    if products.several_samples is not None:
        kv_heads = q_c.shape[1]
        k_c, others = _of_query_heads(k_c, kv_heads), tuple(_of_query_heads(x, kv_heads) for x in others)
    rows = batch * kv_heads
    scores = q_c.shape[1] // kv_heads * q_c.shape[2] * num_kv_blocks
    step = max(1, SCORES_AT_A_TIME // scores)
    flat = [None if x is None else x.reshape(rows, -1, x.shape[3]) for x in (q_c, k_c, *others)]
    for start in range(0, rows, step):
        yield [None if x is None else x[start : start + step] for x in flat]


def _of_query_heads(x: Any, heads: int) -> Any:
    """Means of key/value heads [B, H_kv, n, D] for each query head; those of query heads, and None, as they are."""
    return x if x is None or x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _joined(parts: list[Tensor], shape: Sequence[int]) -> Tensor:
    """The results of ``_scored_at_a_time`` in one tensor; where all were scored at once, without a copy."""
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(shape)


def _joined_of_keys(products: Products, parts: list[Tensor], q_c: Tensor, like: Tensor) -> Tensor:
    """The same of gradients in means of keys: those of the query heads that share them are added."""
    if products.several_samples is None:
        return _joined(parts, like.shape)
    batch, heads, _, head_dim = q_c.shape
    kv_heads = like.shape[1]
    return _joined(parts, (batch, kv_heads, heads // kv_heads, like.shape[2], head_dim)).sum(2)


def _round_to(dtype: torch.dtype, x: Tensor) -> Tensor:
    """Rounds an fp32 tensor to the values of a dtype, in place."""
    return x if dtype == x.dtype else x.copy_(x.to(dtype))


def _rounded_means(dtype: torch.dtype, *means: Tensor | None) -> list[Any]:
    return [x if x is None else x.to(dtype).float() for x in means]


def _scores(
    products: Products, q_rows: Tensor, k_rows: Tensor, softmax_scale: float, selection_dtype: torch.dtype
) -> Tensor:
    """The scores that order the key blocks: fp32 before scaling, a narrower dtype after, since its scaling can tie."""
    scores = products.of_blocks(q_rows, k_rows.mT, float("-inf"))
    if selection_dtype == torch.float32:
        return scores
    return _round_to(selection_dtype, _round_to(selection_dtype, scores).mul_(softmax_scale))


def _softmax(
    scores: Tensor,
    kv_sizes: Tensor | None,
    softmax_scale: float,
    selection_dtype: torch.dtype,
) -> Tensor:
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
    tile: Sequence[int],
    segments: Sequence[int] | None,
    softmax_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the output of ``coarse_attend`` in q_c, k_c and v_c."""
    run = selection_backend_for("coarse_attend_backward", backend, q_c.device)
    products = Products.of(run, tile, segments)
    dq_c, dk_c, dv_c = [], [], []
    means = _rounded_means(selection_dtype, q_c, k_c, v_c)
    for q_rows, k_rows, v_rows, dout_rows in _scored_at_a_time(products, *means, dout_c.contiguous()):
        scores = _scores(products, q_rows, k_rows, softmax_scale, selection_dtype)
        p = _softmax(scores, kv_sizes, softmax_scale, selection_dtype)
        dv_c.append(products.over_blocks(p.mT, dout_rows))
        dp = products.of_blocks(dout_rows * softmax_scale, v_rows.mT)
        ds = softmax_backward(dp, p, -1, torch.float32)
        dq_c.append(products.over_blocks(ds, k_rows))
        dk_c.append(products.over_blocks(ds.mT, q_rows))
    dk, dv = (_joined_of_keys(products, parts, q_c, like) for parts, like in ((dk_c, k_c), (dv_c, v_c)))
    return _joined(dq_c, q_c.shape), dk, dv


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
    tile: Sequence[int],
    segments: Sequence[int] | None,
    softmax_scale: float,
    backend: str,
) -> Tensor:
    """The tangent of the output of ``coarse_attend`` along those of q_c, k_c and v_c."""
    run = selection_backend_for("coarse_attend_tangent", backend, q_c.device)
    products = Products.of(run, tile, segments)
    out_t = []
    means = _rounded_means(selection_dtype, q_c, k_c, v_c)
    for q_rows, k_rows, v_rows, q_t, k_t, v_t in _scored_at_a_time(products, *means, q_c_t, k_c_t, v_c_t):
        scores = _scores(products, q_rows, k_rows, softmax_scale, selection_dtype)
        p = _softmax(scores, kv_sizes, softmax_scale, selection_dtype)
        scores_t = (products.of_blocks(q_t, k_rows.mT) + products.of_blocks(q_rows, k_t.mT)) * softmax_scale
        p_t = p * (scores_t - (p * scores_t).sum(-1, keepdim=True))
        out_t.append(products.over_blocks(p_t, v_rows) + products.over_blocks(p, v_t))
    return _joined(out_t, q_c.shape)


@coarse_attend_tangent.fake
def _(q_c, *_):
    return contiguous_like(q_c)


def _setup_coarse_attend(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    tensors, (_topk, _compete, *ctx.static) = inputs[:4], inputs[4:]
    v_c = tensors[2]
    ctx.mark_non_differentiable(*(output if v_c is None else output[1:]))
    save_tensors(ctx, *tensors)


def _coarse_attend_grad(ctx: Any, dout_c: Tensor | None, *_: None) -> tuple:
    if dout_c is None:
        return (None,) * 11
    grads = coarse_attend_backward(*ctx.saved_tensors, dout_c, *ctx.static)
    return *grads, *(None,) * 8


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
def select_blocks(
    scores: Tensor,
    kv_sizes: Tensor | None,
    topk: Sequence[int],
    compete: bool,
    tile: Sequence[int],
    segments: Sequence[int] | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The selection of ``coarse_attend`` by given scores [B, H, n_q, n_k], where every block that a query block attends
    is named: ``(q2k_idx, q2k_num)``, int32 [B, H, n_q, m] and [B, H, n_q]."""
    products = Products.of(selection_backend_for("coarse_attend", backend, scores.device), tile, segments)
    topk = [min(count, scores.shape[3]) for count in topk]
    idx, num = products.select(scores.float().contiguous().flatten(0, 1), kv_sizes, topk, compete)
    if products.segments is not None:
        entry = torch.arange(listed_width(products.segments, topk), device=scores.device, dtype=torch.int32)
        listed = torch.nn.functional.pad(idx, (0, len(entry) - idx.shape[-1]))
        is_run = num[..., None] < 0
        idx = torch.where(is_run, torch.where(entry < -num[..., None], idx[..., :1] + entry, 0), listed)
        num = num.abs()
    return idx.unflatten(0, scores.shape[:2]), num.unflatten(0, scores.shape[:2])


@select_blocks.fake
def _(scores, kv_sizes, topk, compete, tile, segments, backend):
    order = order_of(segments, _triple(tile))
    width = topk[0] if order.segments is None else listed_width(order.segments, topk)
    return (
        scores.new_empty((*scores.shape[:3], width), dtype=torch.int32),
        scores.new_empty(scores.shape[:3], dtype=torch.int32),
    )


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
