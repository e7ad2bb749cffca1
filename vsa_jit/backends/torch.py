"""Plain PyTorch, on any device: gathers the selected blocks of a few query blocks at a time.

Memory is O(selected) for one chunk of query blocks, never a matrix of all queries by all keys. All arithmetic is fp32
or fp64, whatever precision PyTorch is allowed for its own products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vsa_jit.grid import block_tokens
from vsa_jit.problem import Gradients, Operands, Problem, Side, bhsd, empty_like

# Elements of one gathered chunk of keys, and of one chunk of scores.
CHUNK_ELEMENTS = 1 << 20


# One pass over the map gives all gradients.
invert = None


# Devices that compute in fp64.
_FP64_DEVICES = ("cpu", "cuda")


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    # Always in fp64, so that scores have the same bits, and with them the same order, whatever PyTorch is allowed.
    result = _in_fp64(a, b) if a.device.type in _FP64_DEVICES else a @ b
    return result if out is None else out.copy_(result)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a · b in fp32. PyTorch may be allowed TF32 or bf16 inside of such products, and that by settings of the whole
    process, which are not ours to change: then in fp64."""
    if a.device.type not in _FP64_DEVICES:
        return a @ b
    settings = torch.backends.cuda if a.is_cuda else torch.backends.mkldnn
    return a @ b if settings.matmul.fp32_precision in ("none", "ieee") else _in_fp64(a, b)


def _in_fp64(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() @ b.double()).float()


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
    count = (tokens >= 0).sum(-1).clamp(min=1)
    for b in range(dx_view.shape[0]):
        for h in range(dx_view.shape[1]):
            share = (dmean[b, h] / count[:, None])[:, None, :].expand(-1, side.block, -1)
            put(dx_view[b, h], tokens, share)
    return dx


def select(scores: Tensor, kv_sizes: Tensor | None, topk: int, q2k_idx: Tensor, q2k_num: Tensor) -> None:
    # Stable sorts keep the lower index first among equal scores.
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    num = torch.full_like(q2k_num, topk)
    if kv_sizes is not None:
        empty = kv_sizes < 1
        order = order.gather(-1, empty[order].sort(dim=-1, stable=True).indices)
        num = num.minimum((~empty).sum())
    kept = torch.arange(topk, device=scores.device) < num[..., None]
    idx = torch.where(kept, order[..., :topk], scores.shape[-1]).sort(dim=-1).values
    q2k_idx.copy_(torch.where(kept, idx, 0))
    q2k_num.copy_(num)


def compact(block_map: Tensor, q2k_idx: Tensor, q2k_num: Tensor) -> None:
    q2k_num.copy_(block_map.sum(-1))
    order = block_map.sort(dim=-1, descending=True, stable=True).indices
    kept = torch.arange(block_map.shape[-1], device=block_map.device) < q2k_num[..., None]
    q2k_idx.copy_(torch.where(kept, order, 0))


@dataclass(frozen=True)
class Chunk:
    """Some query blocks of one head, the keys that they selected and their scores."""

    b: int
    h: int
    h_kv: int
    rows: slice
    q: Tensor  # [c, block, D]
    k: Tensor  # [c, m·block, D]
    v: Tensor  # [c, m·block, D]
    kv_tokens: Tensor  # [c, m·block]
    scores: Tensor  # [c, block, m·block], scaled, -inf where the key is not valid
    poisoned: Tensor  # [c, 1, 1]: the map names a block that does not exist


def chunks(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q2k_idx: Tensor,
    q2k_num: Tensor,
    q_tokens: Tensor,
    kv_tokens: Tensor,
) -> Iterator[Chunk]:
    width = q2k_idx.shape[-1]
    if q2k_num.device.type == "cpu":
        width = min(width, max(int(q2k_num.max()), 0))
    per_block = max(width, 1) * problem.block * max(problem.head_dim, problem.block)
    step = max(1, CHUNK_ELEMENTS // per_block)
    slot = torch.arange(width, device=q.device)
    for b in range(problem.batch):
        for h in range(problem.queries.heads):
            h_kv = h // problem.group
            for start in range(0, problem.queries.num_blocks, step):
                rows = slice(start, min(start + step, problem.queries.num_blocks))
                named = q2k_idx[b, h, rows, :width].long()
                used = slot < q2k_num[b, h, rows, None]
                exists = (named >= 0) & (named < problem.keys.num_blocks)
                tokens = kv_tokens[named.clamp(0, problem.keys.num_blocks - 1)]
                tokens = torch.where((used & exists)[..., None], tokens, -1).flatten(1)
                q_rows = take(q[b, h], q_tokens[rows])
                k_rows = take(k[b, h_kv], tokens)
                v_rows = take(v[b, h_kv], tokens)
                scores = product(q_rows, k_rows.mT).mul_(problem.softmax_scale)
                scores.masked_fill_((tokens < 0)[:, None, :], float("-inf"))
                poisoned = (used & ~exists).any(-1)[:, None, None]
                yield Chunk(b, h, h_kv, rows, q_rows, k_rows, v_rows, tokens, scores, poisoned)


def softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities over the last dimension, and the log-sum-exp."""
    lse = scores.logsumexp(-1, keepdim=True)
    # A row without keys has -inf everywhere: its probabilities are 0, not NaN.
    return torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)), lse


def forward(problem: Problem, operands: Operands, keep_out_s: bool) -> tuple[Tensor, Tensor, Tensor | None]:
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
        p, chunk_lse = softmax(chunk.scores)
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


def backward(
    problem: Problem,
    operands: Operands,
    out_s: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    need_dq: bool,
    need_dkv: bool,
) -> Gradients:
    q, k, v, q2k_idx, q2k_num, q_sizes, kv_sizes, out_c, gate, gate_value = operands
    layout = problem.queries.layout
    q_tokens = block_tokens(problem.queries, q_sizes, q.device)
    kv_tokens = block_tokens(problem.keys, kv_sizes, q.device)
    dout, out_s = bhsd(dout, layout), bhsd(out_s, layout)
    dgate = dout_c = None
    if out_c is not None:
        dgate = None if gate is None else torch.empty_like(gate, memory_format=torch.contiguous_format)
        dout_c = torch.empty_like(out_c, memory_format=torch.contiguous_format)
        for b in range(problem.batch):
            for h in range(problem.queries.heads):
                dout_rows = take(dout[b, h], q_tokens)
                weight = gate_value if gate is None else take(bhsd(gate, layout)[b, h], q_tokens)
                dout_c[b, h] = (weight * dout_rows).sum(1)
                if dgate is not None:
                    put(bhsd(dgate, layout)[b, h], q_tokens, dout_rows * out_c[b, h, :, None, :])

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
        delta = (dout_rows * take(out_s[b, h], tokens)).sum(-1, keepdim=True)
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
                put(bhsd(dq, layout)[b, h], q_tokens, dq_blocks)
    if not need_dkv:
        return Gradients(dq, None, None, dgate, dout_c)
    dk, dv = empty_like(k), empty_like(v)
    bhsd(dk, layout).copy_(dk_sum[:, :, :-1])
    bhsd(dv, layout).copy_(dv_sum[:, :, :-1])
    return Gradients(dq, dk, dv, dgate, dout_c)


def take(x: Tensor, tokens: Tensor, fill: float = 0.0) -> Tensor:
    """Rows of ``x`` [S, C] by token, in fp32; ``fill`` where the token is -1."""
    rows = x[tokens.clamp(min=0)].float()
    return rows.masked_fill((tokens < 0)[..., None], fill)


def put(x: Tensor, tokens: Tensor, rows: Tensor, fill: float = 0.0) -> None:
    """Writes rows [n, block, C] to their tokens in ``x`` [S, C]; a token of ``x`` that no slot holds gets ``fill``."""
    # One spare row takes what belongs to no token.
    spare = x.shape[0]
    target = rows.new_full((spare + 1, x.shape[1]), fill)
    target[torch.where(tokens >= 0, tokens, spare)] = rows.float()
    x.copy_(target[:spare])
