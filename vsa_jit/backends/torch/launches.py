"""The backend's functions in plain PyTorch: they gather the selected blocks of a few query blocks at a time.

Memory is O(selected) for one chunk of query blocks, never a matrix of all queries by all keys. All arithmetic is fp32
or fp64, whatever precision PyTorch is allowed for its own products.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from vsa_jit.backends import coarse
from vsa_jit.backends.coarse import Softmax
from vsa_jit.backends.torch.chunks import chunks, exact_product, product, put, softmax_and_lse, take
from vsa_jit.grid import block_tokens
from vsa_jit.problem import Gradients, MeanGradients, Operands, Problem, Side, bhsd, contiguous_like, empty_like
from vsa_jit.segments import Segments

# One pass over the map gives all gradients, and each operator's results are tensors.
transpose_index = takes_one_pass = whole = None


def matmul(a: Tensor, b: Tensor) -> Tensor:
    return exact_product(a, b)


def matmul_of_samples(a: Tensor, b: Tensor, segments: Segments) -> Tensor:
    out = a.new_empty((a.shape[0], a.shape[1], b.shape[2]))
    for own in _blocks_of_samples(segments):
        out[:, own, own] = exact_product(a[:, own], b[:, :, own])
    return out


def matmul_over_samples(a: Tensor, b: Tensor, segments: Segments) -> Tensor:
    return torch.cat([exact_product(a[:, own, own], b[:, own]) for own in _blocks_of_samples(segments)], dim=1)


def _blocks_of_samples(segments: Segments) -> list[slice]:
    return [slice(sample.first_block, sample.first_block + sample.num_blocks) for sample in segments.samples]


def block_means(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor | None, q_sizes: Tensor | None, kv_sizes: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    q_c, k_c = _block_mean(problem.queries, q, q_sizes), _block_mean(problem.keys, k, kv_sizes)
    return q_c, k_c, None if v is None else _block_mean(problem.keys, v, kv_sizes)


def _block_mean(side: Side, x: Tensor, sizes: Tensor | None) -> Tensor:
    x = bhsd(x, side.layout)
    tokens = block_tokens(side, sizes, x.device)
    count = (tokens >= 0).sum(-1).clamp(min=1)
    means = [take(x_bh, tokens).sum(1) / count[:, None] for x_bh in x.flatten(0, 1)]
    return torch.stack(means).unflatten(0, x.shape[:2])


def block_mean_backward(side: Side, dmean: Tensor, x: Tensor, sizes: Tensor | None) -> Tensor:
    dx = empty_like(x)
    dx_view = bhsd(dx, side.layout)
    tokens = block_tokens(side, sizes, x.device)
    for b in range(dx_view.shape[0]):
        for h in range(dx_view.shape[1]):
            put(dx_view[b, h], tokens, _shares(dmean[b, h], tokens).expand(-1, side.block, -1))
    return dx


def _shares(dmean: Tensor, tokens: Tensor) -> Tensor:
    """What each token of a block gets of its mean's gradient: [..., n, D] to [..., n, 1, D]."""
    count = (tokens >= 0).sum(-1).clamp(min=1)
    return (dmean / count[:, None])[..., None, :]


def select(scores: Tensor, kv_sizes: Tensor | None, topk: int, softmax: Softmax | None = None) -> tuple[Tensor, Tensor]:
    if softmax is not None:
        _scale_narrow(scores, softmax)
    # Stable sorts keep the lower index first among equal scores.
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    num = scores.new_full(scores.shape[:-1], topk, dtype=torch.int32)
    if kv_sizes is not None:
        empty = kv_sizes < 1
        order = order.gather(-1, empty[order].sort(dim=-1, stable=True).indices)
        num = num.minimum((~empty).sum(dtype=torch.int32))
    kept = torch.arange(topk, device=scores.device) < num[..., None]
    idx = torch.where(kept, order[..., :topk], scores.shape[-1]).sort(dim=-1).values
    if softmax is not None:
        _softmax(scores, _left_out(kv_sizes), softmax)
    return torch.where(kept, idx, 0).int(), num


def select_in_samples(
    scores: Tensor, rows: Tensor, width: int, softmax: Softmax | None = None
) -> tuple[Tensor, Tensor]:
    if softmax is not None:
        _scale_narrow(scores, softmax)
    first, _, num, is_forced = rows.unbind(1)
    is_other = _is_other_sample(rows)
    rank = torch.where(is_other, 2, 1 - is_forced)
    scores = scores.unflatten(1, (-1, len(rows)))
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    order = order.gather(-1, rank.expand(scores.shape).gather(-1, order).sort(dim=-1, stable=True).indices)
    kept = torch.arange(width, device=rows.device) < num[:, None]
    idx = torch.where(kept, order[..., :width], len(rows)).sort(dim=-1).values
    idx = torch.where(kept, idx, 0).int()
    idx[..., 0] = torch.where(num < 0, first, idx[..., 0])
    if softmax is not None:
        _softmax(scores, is_other, softmax)
    return idx.flatten(1, 2), num.expand(scores.shape[:-1]).flatten(1)


def softmax(products: Tensor, kv_sizes: Tensor | None, rows: Tensor | None, settings: Softmax) -> None:
    _scale_narrow(products, settings)
    if rows is None:
        _softmax(products, _left_out(kv_sizes), settings)
    else:
        _softmax(products.unflatten(1, (-1, len(rows))), _is_other_sample(rows), settings)


def softmax_backward(p: Tensor, dp: Tensor, rows: Tensor | None, scale: float) -> None:
    if rows is not None:
        dp.unflatten(1, (-1, len(rows))).masked_fill_(_is_other_sample(rows), 0.0)
    dp.sub_((p * dp).sum(-1, keepdim=True)).mul_(p).mul_(scale)


def _scale_narrow(products: Tensor, softmax: Softmax) -> None:
    if softmax.dtype != torch.float32:
        products.copy_(products.to(softmax.dtype)).mul_(softmax.scale)
        products.copy_(products.to(softmax.dtype))


def _softmax(scores: Tensor, left_out: Tensor | None, softmax: Softmax) -> None:
    if softmax.dtype == torch.float32:
        scores.mul_(softmax.scale)
    if left_out is not None:
        scores.masked_fill_(left_out, float("-inf"))
    scores.copy_(scores.softmax(-1).to(softmax.dtype))


def _left_out(kv_sizes: Tensor | None) -> Tensor | None:
    """The empty key blocks. Where all are empty, all hold a mean of 0: attending those gives the 0 that is wanted."""
    if kv_sizes is None:
        return None
    empty = kv_sizes < 1
    return empty & ~empty.all()


def _is_other_sample(rows: Tensor) -> Tensor:
    """Of each block and key block whether they are of different samples: bool [n, n]."""
    column = torch.arange(len(rows), device=rows.device)
    return (column < rows[:, :1]) | (column >= rows[:, 1:2])


def map_to_indices(block_map: Tensor) -> tuple[Tensor, Tensor]:
    block_map = block_map.contiguous()
    num = block_map.sum(-1, dtype=torch.int32)
    order = block_map.sort(dim=-1, descending=True, stable=True).indices
    kept = torch.arange(block_map.shape[-1], device=block_map.device) < num[..., None]
    return torch.where(kept, order, 0).int(), num


def attend(problem: Problem, operands: Operands, keep_out_s: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    q, k, v, q2k_idx, q2k_num, q_sizes, kv_sizes, out_c, gate, gate_value = operands
    out = empty_like(q)
    out_s = empty_like(q) if keep_out_s else None
    lse = q.new_empty((problem.batch, problem.queries.heads, problem.queries.length), dtype=torch.float32)
    q, k, v, out_view = (bhsd(x, problem.queries.layout) for x in (q, k, v, out))
    gate_view = None if gate is None else bhsd(gate, problem.queries.layout)
    q_tokens = block_tokens(problem.queries, q_sizes, q.device)
    kv_tokens = block_tokens(problem.keys, kv_sizes, q.device)
    padded = q.new_empty((problem.queries.num_blocks, problem.block, problem.head_dim + 1), dtype=torch.float32)
    for chunk in chunks(problem, q, k, v, q2k_idx, q2k_num, q_tokens, kv_tokens):
        p, chunk_lse = softmax_and_lse(chunk.scores)
        block_out = torch.cat([product(p, chunk.v), chunk_lse], -1)
        padded[chunk.rows] = block_out.masked_fill(chunk.poisoned, float("nan"))
        if chunk.rows.stop < problem.queries.num_blocks:
            continue
        b, h = chunk.b, chunk.h
        put(lse[b, h, :, None], q_tokens, padded[..., -1:], fill=float("-inf"))
        fine = padded[..., :-1]
        if out_s is not None:
            put(bhsd(out_s, problem.queries.layout)[b, h], q_tokens, fine)
        if out_c is not None:
            weight = gate_value if gate_view is None else take(gate_view[b, h], q_tokens)
            fine = fine + weight * out_c[b, h, :, None, :]
        put(out_view[b, h], q_tokens, fine)
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
    layout = problem.queries.layout
    q_tokens = block_tokens(problem.queries, q_sizes, q.device)
    kv_tokens = block_tokens(problem.keys, kv_sizes, q.device)
    dout, out_s = bhsd(dout, layout), bhsd(out_s, layout)
    dgate = dout_c = None
    if out_c is not None:
        dgate = None if gate is None else contiguous_like(gate)
        dout_c = contiguous_like(out_c)
        for b in range(problem.batch):
            for h in range(problem.queries.heads):
                dout_rows = take(dout[b, h], q_tokens)
                weight = gate_value if gate is None else take(bhsd(gate, layout)[b, h], q_tokens)
                dout_c[b, h] = (weight * dout_rows).sum(1)
                if dgate is not None:
                    put(bhsd(dgate, layout)[b, h], q_tokens, dout_rows * out_c[b, h, :, None, :])

    dq_c = dk_c = dv_c = None
    if mean_gradients is not None:
        dq_c, dk_c, dv_c = mean_gradients(dout_c)
    dq = empty_like(q) if need_dq else None
    kv_shape = (problem.batch, problem.keys.heads, problem.keys.length + 1, problem.head_dim)
    dk_sum = q.new_zeros(kv_shape if need_dkv else 0, dtype=torch.float32)
    dv_sum = q.new_zeros(kv_shape if need_dkv else 0, dtype=torch.float32)
    dq_blocks = q.new_empty((problem.queries.num_blocks, problem.block, problem.head_dim), dtype=torch.float32)
    q_view, k_view, v_view = (bhsd(x, layout) for x in (q, k, v))
    for chunk in chunks(problem, q_view, k_view, v_view, q2k_idx, q2k_num, q_tokens, kv_tokens):
        b, h, tokens = chunk.b, chunk.h, q_tokens[chunk.rows]
        chunk_lse = take(lse[b, h, :, None], tokens, fill=float("-inf"))
        p = torch.exp(chunk.scores - chunk_lse)
        p = p.masked_fill(chunk_lse == float("-inf"), 0.0)
        dout_rows = take(dout[b, h], tokens)
        out_rows = take(out_s[b, h], tokens)
        if is_combined and out_c is not None:
            out_rows -= gate_value * out_c[b, h, chunk.rows, None, :]
        delta = (dout_rows * out_rows).sum(-1, keepdim=True)
        if dlse is not None:
            delta = delta - take(dlse[b, h, :, None], tokens)
        ds = p * (product(dout_rows, chunk.v.mT) - delta) * problem.softmax_scale
        # What a slot without a token holds may be NaN, and goes to the spare row.
        missing = chunk.kv_tokens < 0
        ds = ds.masked_fill(missing[:, None, :], 0.0)
        if need_dkv:
            into = chunk.kv_tokens.masked_fill(missing, problem.keys.length).flatten()
            dk_sum[b, chunk.h_kv].index_add_(0, into, product(ds.mT, chunk.q).flatten(0, 1))
            dv_sum[b, chunk.h_kv].index_add_(0, into, product(p.mT, dout_rows).flatten(0, 1))
        if dq is not None:
            dq_blocks[chunk.rows] = product(ds, chunk.k)
            if chunk.rows.stop == problem.queries.num_blocks:
                if dq_c is not None:
                    dq_blocks += _shares(dq_c[b, h], q_tokens)
                put(bhsd(dq, layout)[b, h], q_tokens, dq_blocks)
    if not need_dkv:
        return Gradients(dq, None, None, dgate, dout_c)
    into = kv_tokens.masked_fill(kv_tokens < 0, problem.keys.length).flatten()
    for total, dmean in ((dk_sum, dk_c), (dv_sum, dv_c)):
        if dmean is not None:
            shares = _shares(dmean, kv_tokens).expand(-1, -1, -1, problem.block, -1)
            total.index_add_(2, into, shares.flatten(2, 3))
    dk, dv = empty_like(k), empty_like(v)
    bhsd(dk, layout).copy_(dk_sum[:, :, :-1])
    bhsd(dv, layout).copy_(dv_sum[:, :, :-1])
    return Gradients(dq, dk, dv, dgate, dout_c)


def attend_tangent(
    problem: Problem,
    operands: Operands,
    q_t: Tensor,
    k_t: Tensor,
    v_t: Tensor,
    out_c_t: Tensor | None,
    gate_t: Tensor | None,
) -> tuple[Tensor, Tensor]:
    # With scores s and p = softmax(s) over the keys: lse_t = Σ p·s_t and out_t = (p·(s_t - lse_t)) v + p v_t.
    q, k, v, q2k_idx, q2k_num, q_sizes, kv_sizes, out_c, gate, gate_value = operands
    out_t = empty_like(q)
    lse_t = q.new_empty((problem.batch, problem.queries.heads, problem.queries.length), dtype=torch.float32)
    q, k, v, q_t, k_t, v_t, out_view = (bhsd(x, problem.queries.layout) for x in (q, k, v, q_t, k_t, v_t, out_t))
    q_tokens = block_tokens(problem.queries, q_sizes, q.device)
    kv_tokens = block_tokens(problem.keys, kv_sizes, q.device)
    rows = q.new_empty((problem.queries.num_blocks, problem.block, problem.head_dim + 1), dtype=torch.float32)
    for chunk in chunks(problem, q, k, v, q2k_idx, q2k_num, q_tokens, kv_tokens):
        b, h, h_kv = chunk.b, chunk.h, chunk.h_kv
        p, _ = softmax_and_lse(chunk.scores)
        q_rows_t = take(q_t[b, h], q_tokens[chunk.rows])
        k_rows_t, v_rows_t = take(k_t[b, h_kv], chunk.kv_tokens), take(v_t[b, h_kv], chunk.kv_tokens)
        scores_t = (product(q_rows_t, chunk.k.mT) + product(chunk.q, k_rows_t.mT)) * problem.softmax_scale
        rows_lse_t = (p * scores_t).sum(-1, keepdim=True)
        rows_out_t = product(p * (scores_t - rows_lse_t), chunk.v) + product(p, v_rows_t)
        rows[chunk.rows] = torch.cat([rows_out_t, rows_lse_t], -1).masked_fill(chunk.poisoned, float("nan"))
        if chunk.rows.stop < problem.queries.num_blocks:
            continue
        put(lse_t[b, h, :, None], q_tokens, rows[..., -1:])
        fine_t = rows[..., :-1]
        if out_c is not None and out_c_t is not None:
            weight = gate_value if gate is None else take(bhsd(gate, problem.queries.layout)[b, h], q_tokens)
            fine_t = fine_t + weight * out_c_t[b, h, :, None, :]
            if gate_t is not None:
                fine_t = fine_t + take(bhsd(gate_t, problem.queries.layout)[b, h], q_tokens) * out_c[b, h, :, None, :]
        put(out_view[b, h], q_tokens, fine_t)
    return out_t, lse_t


_COARSE_KERNELS = coarse.CoarseKernels(
    matmul, matmul_of_samples, matmul_over_samples, select, select_in_samples, softmax, softmax_backward
)
coarse_attend = functools.partial(coarse.coarse_attend, _COARSE_KERNELS)
coarse_attend_backward = functools.partial(coarse.coarse_attend_backward, _COARSE_KERNELS)
coarse_attend_tangent = functools.partial(coarse.coarse_attend_tangent, _COARSE_KERNELS)
