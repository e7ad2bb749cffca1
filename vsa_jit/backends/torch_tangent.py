"""Forward-mode derivatives of the fine branch in plain PyTorch, chunk by chunk like the backend ``torch``."""

from __future__ import annotations

import torch
from torch import Tensor

from vsa_jit.backends.torch import chunks, product, put, softmax, take
from vsa_jit.grid import block_tokens
from vsa_jit.problem import Operands, Problem, bhsd, empty_like


def attend(
    problem: Problem,
    operands: Operands,
    q_t: Tensor,
    k_t: Tensor,
    v_t: Tensor,
    out_c_t: Tensor | None,
    gate_t: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The tangents of the output and of lse along those of q, k, v, the coarse output and the gate.

    With scores ``s`` and ``p = softmax(s)`` over the keys: ``lse_t = Σ p·s_t`` and
    ``out_t = (p·(s_t − lse_t)) v + p v_t``.
    """
    q, k, v, q2k_idx, q2k_num, q_sizes, kv_sizes, out_c, gate, gate_value = operands
    out_t = empty_like(q)
    lse_t = q.new_empty((problem.batch, problem.queries.heads, problem.queries.length), dtype=torch.float32)
    q, k, v, q_t, k_t, v_t, out_view = (bhsd(x, problem.queries.layout) for x in (q, k, v, q_t, k_t, v_t, out_t))
    q_tokens = block_tokens(problem.queries, q_sizes, q.device)
    kv_tokens = block_tokens(problem.keys, kv_sizes, q.device)
    rows = q.new_empty((problem.queries.num_blocks, problem.block, problem.head_dim + 1), dtype=torch.float32)
    for chunk in chunks(problem, q, k, v, q2k_idx, q2k_num, q_tokens, kv_tokens):
        b, h, h_kv = chunk.b, chunk.h, chunk.h_kv
        p, _ = softmax(chunk.scores)
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
