"""The coarse branch as products of matrices and kernels over rows, for a backend that has those."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vsa_jit.problem import Coarse
from vsa_jit.segments import Segments, selection_rows, selection_width
from vsa_jit.tables import on_device

# Scores of block means that are computed at a time, so that they need little memory however many blocks there are.
SCORES_AT_A_TIME = 1 << 24


class Softmax(NamedTuple):
    """How fp32 products of block means become probabilities: softmax(products · scale) over the key blocks of a row.

    Attributes:
        scale: more than 0.
        dtype: fp32, or a narrower dtype, to which each step is then rounded: the products, the scaled ones and the
            probabilities.
    """

    scale: float
    dtype: torch.dtype


class CoarseKernels(NamedTuple):
    """What a backend has for the coarse branch. Products are as exact as fp32 arithmetic, whatever PyTorch is allowed.

    Attributes:
        matmul: a · b, fp32 [R, M, K] and [R, K, N] of any strides, contiguous.
        matmul_of_samples: ``(a, b, segments)``: the same for pairs of blocks of one sample, [R, n, D] and [R, D, n];
            undefined where row and column are blocks of different samples.
        matmul_over_samples: ``(a, b, segments)``: the same where the sum runs over the blocks of the row's sample
            alone, [R, n, n] and [R, n, D].
        select, select_in_samples: those of ``Backend``, with a last argument ``softmax: Softmax | None``. Where it is
            given, the scores are products, and become probabilities as by ``softmax``. In fp32 the products themselves
            are the scores to select by, in a narrower dtype what they are scaled and rounded to: the scaling can tie
            there. Between blocks of different samples scores may be anything.
        softmax: ``(products, kv_sizes, rows, softmax)``: probabilities of the key blocks of each row, in place. A block
            without valid tokens has probability 0, unless no block has any. products: fp32 [R, M, n_k], contiguous;
            rows: None, or as in ``select_in_samples``: blocks of other samples than the row's have probability 0. Only
            where samples begin and end is read.
        softmax_backward: ``(p, dp, rows, scale)``: gradient in the products that ``softmax`` had, or their tangent
            turned into that of the probabilities, in place of ``dp``: p · (dp - Σ p · dp) · scale, the sum over a row.
            p, dp: fp32 [R, M, n_k], contiguous; between blocks of different samples ``dp`` may be anything, and stays
            undefined.
    """

    matmul: Callable[[Tensor, Tensor], Tensor]
    matmul_of_samples: Callable[[Tensor, Tensor, Segments], Tensor]
    matmul_over_samples: Callable[[Tensor, Tensor, Segments], Tensor]
    select: Callable[[Tensor, Tensor | None, int, Softmax | None], tuple[Tensor, Tensor]]
    select_in_samples: Callable[[Tensor, Tensor, int, Softmax | None], tuple[Tensor, Tensor]]
    softmax: Callable[[Tensor, Tensor | None, Tensor | None, Softmax], None]
    softmax_backward: Callable[[Tensor, Tensor, Tensor | None, float], None]


def coarse_attend(
    run: CoarseKernels,
    coarse: Coarse,
    q_c: Tensor,
    k_c: Tensor,
    v_c: Tensor | None,
    kv_sizes: Tensor | None,
    topk: Sequence[int],
    compete: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """``Backend.coarse_attend`` by the products and selections of a backend."""
    products = Products(run, coarse.segments)
    # A program that was traced with a longer sequence may ask for more.
    topk = [min(count, k_c.shape[2]) for count in topk]
    dtype = coarse.selection_dtype
    # Without probabilities, fp32 products are selected by as they are.
    has_softmax = v_c is not None or dtype != torch.float32
    softmax = Softmax(coarse.softmax_scale, dtype) if has_softmax else None
    outs, indices, numbers = [], [], []
    for q_rows, k_rows, v_rows in _scored_at_a_time(products, *rounded_means(dtype, q_c, k_c, v_c)):
        # Scores, which become probabilities.
        p = products.of_blocks(q_rows, k_rows.mT)
        idx, num = select(run, coarse.segments, p, kv_sizes, topk, compete, softmax)
        indices.append(idx)
        numbers.append(num)
        if v_rows is not None:
            outs.append(_round_to(dtype, products.over_blocks(p, v_rows)))
    rows_of_blocks = q_c.shape[:3]
    out_c = None if v_c is None else _joined(outs, q_c.shape)
    return out_c, _joined(indices, (*rows_of_blocks, -1)), _joined(numbers, rows_of_blocks)


def coarse_attend_backward(
    run: CoarseKernels,
    coarse: Coarse,
    q_c: Tensor,
    k_c: Tensor,
    v_c: Tensor,
    kv_sizes: Tensor | None,
    dout_c: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """``Backend.coarse_attend_backward`` likewise."""
    products = Products(run, coarse.segments)
    softmax = Softmax(coarse.softmax_scale, coarse.selection_dtype)
    dq_c, dk_c, dv_c = [], [], []
    means = rounded_means(softmax.dtype, q_c, k_c, v_c)
    for q_rows, k_rows, v_rows, dout_rows in _scored_at_a_time(products, *means, dout_c.contiguous()):
        p = products.probabilities(q_rows, k_rows.mT, kv_sizes, softmax)
        dv_c.append(products.over_blocks(p.mT, dout_rows))
        ds = products.softmax_backward(p, products.of_blocks(dout_rows, v_rows.mT), softmax.scale)
        dq_c.append(products.over_blocks(ds, k_rows))
        dk_c.append(products.over_blocks(ds.mT, q_rows))
    dk, dv = (_joined_of_keys(products, parts, q_c, like) for parts, like in ((dk_c, k_c), (dv_c, v_c)))
    return _joined(dq_c, q_c.shape), dk, dv


def coarse_attend_tangent(
    run: CoarseKernels,
    coarse: Coarse,
    q_c: Tensor,
    k_c: Tensor,
    v_c: Tensor,
    q_c_t: Tensor,
    k_c_t: Tensor,
    v_c_t: Tensor,
    kv_sizes: Tensor | None,
) -> Tensor:
    """``Backend.coarse_attend_tangent`` likewise."""
    products = Products(run, coarse.segments)
    softmax = Softmax(coarse.softmax_scale, coarse.selection_dtype)
    out_t = []
    means = rounded_means(softmax.dtype, q_c, k_c, v_c)
    for q_rows, k_rows, v_rows, q_t, k_t, v_t in _scored_at_a_time(products, *means, q_c_t, k_c_t, v_c_t):
        p = products.probabilities(q_rows, k_rows.mT, kv_sizes, softmax)
        products_t = products.of_blocks(q_t, k_rows.mT).add_(products.of_blocks(q_rows, k_t.mT))
        # Its matrix of derivatives is symmetric, so that the tangent of softmax is its gradient's formula.
        p_t = products.softmax_backward(p, products_t, softmax.scale)
        out_t.append(products.over_blocks(p_t, v_rows) + products.over_blocks(p, v_t))
    return _joined(out_t, q_c.shape)


class Products(NamedTuple):
    """Products of block means and their softmax, which never reach from one sample into another: not even a NaN does.

    Attributes:
        segments: None where all blocks belong to one sample that has no context.
    """

    run: CoarseKernels
    segments: Segments | None

    @property
    def several_samples(self) -> Segments | None:
        """The segments, where they are of several samples."""
        return self.segments if self.segments is not None and len(self.segments.samples) > 1 else None

    def of_blocks(self, a: Tensor, b: Tensor) -> Tensor:
        """a · b for each pair of blocks: [R, n_q, D] and [R, D, n_k]; undefined where they are of different samples."""
        several = self.several_samples
        return self.run.matmul(a, b) if several is None else self.run.matmul_of_samples(a, b, several)

    def over_blocks(self, a: Tensor, b: Tensor) -> Tensor:
        """a · b, which sums over the blocks of a sample: [R, n, n_k] and [R, n_k, D]."""
        several = self.several_samples
        return self.run.matmul(a, b) if several is None else self.run.matmul_over_samples(a, b, several)

    def probabilities(self, a: Tensor, b: Tensor, kv_sizes: Tensor | None, softmax: Softmax) -> Tensor:
        """The softmax of ``of_blocks``."""
        p = self.of_blocks(a, b)
        self.run.softmax(p, kv_sizes, self._rows_of_samples(p.device), softmax)
        return p

    def softmax_backward(self, p: Tensor, dp: Tensor, scale: float) -> Tensor:
        """p · (dp - Σ p · dp) · scale of ``probabilities``, in place of ``dp``."""
        self.run.softmax_backward(p, dp, self._rows_of_samples(p.device), scale)
        return dp

    def _rows_of_samples(self, device: torch.device) -> Tensor | None:
        """Where the sample of each block begins and ends, if there are several samples."""
        several = self.several_samples
        # How many blocks are selected is in the table, too, and does not matter.
        return None if several is None else selection_table(several, [0] * len(several.samples), False, device)


def select(
    run: Any,
    segments: Segments | None,
    scores: Tensor,
    kv_sizes: Tensor | None,
    topk: Sequence[int],
    compete: bool,
    softmax: Softmax | None = None,
) -> tuple[Tensor, Tensor]:
    """``(q2k_idx, q2k_num)`` of the scores of blocks, int32 [R, n_q, m] and [R, n_q], see ``Backend.coarse_attend``.

    Args:
        run: has ``select`` and ``select_in_samples`` of ``CoarseKernels``.
    """
    if segments is None:
        return run.select(scores, kv_sizes, topk[0], softmax)
    rows = selection_table(segments, topk, compete, scores.device)
    return run.select_in_samples(scores, rows, selection_width(segments, topk), softmax)


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


def rounded_means(dtype: torch.dtype, *means: Tensor | None) -> list[Any]:
    """fp32 means with the values of a dtype; those that are None as they are."""
    return [x if x is None else x.to(dtype).float() for x in means]


def selection_table(segments: Segments, topk: Sequence[int], compete: bool, device: torch.device) -> Tensor:
    """``selection_rows`` on a device, where it is kept."""
    key = "selection", segments, tuple(topk), compete
    return on_device(key, device, lambda: selection_rows(segments, topk, compete))
