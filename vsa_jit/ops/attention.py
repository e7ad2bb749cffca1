"""Attention of query blocks over the key blocks that were selected for them."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from vsa_jit import flops
from vsa_jit.backends.choose import backend_for, choose
from vsa_jit.checks import warn_of_layout
from vsa_jit.fastpath import tracing_context
from vsa_jit.operators import Operator, save_tensors, tangent_or_zeros
from vsa_jit.problem import Operands, Problem, bhsd, empty_like


@Operator
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q2k_idx: Tensor,
    q2k_num: Tensor,
    q_sizes: Tensor | None,
    kv_sizes: Tensor | None,
    tile: Sequence[int],
    segments: Sequence[int] | None,
    layout: str,
    softmax_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Attention of each query block over its key blocks.

    Returns:
        ``(out, lse)``: out like q; lse fp32 [B, H, S_q], natural log, -inf where a query has no key.
    """
    problem = Problem.of(q, k, tile, segments, layout, softmax_scale)
    operands = Operands(q, k, v, q2k_idx, q2k_num, q_sizes, kv_sizes, None, None, 0.0)
    out, lse, _ = backend_for("attend", problem, backend, q, k, v).attend(problem, operands, False)
    return out, lse


@attend.fake
def _(q, k, v, q2k_idx, q2k_num, q_sizes, kv_sizes, *static):
    problem = Problem.of(q, k, *static[:-1])
    warn_in_compiled_program(problem)
    lse = q.new_empty((problem.batch, problem.queries.heads, problem.queries.length), dtype=torch.float32)
    return empty_like(q), lse


def warn_in_compiled_program(problem: Problem) -> None:
    """Of an operator's fake implementation: a program that is being compiled cannot warn by itself."""
    if tracing_context() is not None:
        warn_of_layout(problem, stacklevel=3)


@Operator
def attend_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q2k_idx: Tensor,
    q2k_num: Tensor,
    q_sizes: Tensor | None,
    kv_sizes: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    need_dq: bool,
    need_dkv: bool,
    tile: Sequence[int],
    segments: Sequence[int] | None,
    layout: str,
    softmax_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``attend`` in q, k and v; empty where they are not needed."""
    problem = Problem.of(q, k, tile, segments, layout, softmax_scale)
    operands = Operands(q, k, v, q2k_idx, q2k_num, q_sizes, kv_sizes, None, None, 0.0)
    run = backend_for("attend_backward", problem, backend, q, k, v)
    gradients = run.attend_backward(problem, operands, out, lse, dout, dlse, need_dq, need_dkv)
    return cast(Any, gradients[:3])


@attend_backward.fake
def _(q, k, v, q2k_idx, q2k_num, q_sizes, kv_sizes, out, lse, dout, dlse, need_dq, need_dkv, *_):
    return tuple(
        empty_like(x) if needed else q.new_empty(0) for x, needed in ((q, need_dq), (k, need_dkv), (v, need_dkv))
    )


def weight_of(gate: Tensor | None, gate_value: float) -> tuple[Tensor | None, float]:
    """Of the coarse output: a gate of no dimensions, on the CPU, is a number that ``torch.compile`` keeps symbolic."""
    return (None, gate.item()) if gate is not None and gate.dim() == 0 else (gate, gate_value)


@Operator
def attend_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q2k_idx: Tensor,
    q2k_num: Tensor,
    q_sizes: Tensor | None,
    kv_sizes: Tensor | None,
    out_c: Tensor | None,
    gate: Tensor | None,
    gate_value: float,
    q_t: Tensor,
    k_t: Tensor,
    v_t: Tensor,
    out_c_t: Tensor | None,
    gate_t: Tensor | None,
    tile: Sequence[int],
    segments: Sequence[int] | None,
    layout: str,
    softmax_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The tangents of ``attend``'s out and lse along those of q, k and v, each of its tensor's shape.

    Args:
        out_c, gate, gate_value: a coarse output that is added to the output, and its weight, as ``video_sparse_attn``
            has them; ``out_c_t`` and ``gate_t`` are their tangents.

    Raises:
        NotImplementedError: the call runs on another backend than ``torch``.
    """
    problem = Problem.of(q, k, tile, segments, layout, softmax_scale)
    choice = choose(problem, backend, q.device, q.dtype, (q, k, v))
    if "attend_tangent" not in choice.runners:
        raise NotImplementedError(
            "vsa_jit: forward-mode differentiation (jvp) runs on backend 'torch' only, and this call runs on "
            f"{choice.backend!r}; pass backend='torch'"
        )
    operands = Operands(q, k, v, q2k_idx, q2k_num, q_sizes, kv_sizes, out_c, *weight_of(gate, gate_value))
    run = backend_for("attend_tangent", problem, backend, q, k, v)
    return run.attend_tangent(problem, operands, q_t, k_t, v_t, out_c_t, gate_t)


@attend_tangent.fake
def _(q, k, v, q2k_idx, q2k_num, q_sizes, kv_sizes, out_c, gate, gate_value, q_t, k_t, v_t, out_c_t, gate_t, *static):
    return empty_like(q), q.new_empty(bhsd(q, static[2]).shape[:3], dtype=torch.float32)


def _setup_attend(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    tensors, ctx.static = inputs[:7], inputs[7:]
    save_tensors(ctx, *tensors, *output)


def _attend_grad(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple:
    *tensors, out, lse = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    dout = torch.zeros_like(out) if dout is None else dout
    args = (*tensors, out, lse, dout, dlse, needs[0], needs[1] or needs[2], *ctx.static)
    gradients = attend_backward.call_in_backward(ctx, (dout, dlse), *args)
    return *(x if needed else None for x, needed in zip(gradients, needs, strict=True)), *(None,) * 9


def _attend_jvp(ctx: Any, saved: Sequence[Any], *tangents: Tensor | None) -> tuple:
    *tensors, _out, _lse = saved
    along = [tangent_or_zeros(tangent, x) for tangent, x in zip(tangents[:3], tensors[:3], strict=True)]
    return attend_tangent(*tensors, None, None, 0.0, *along, None, None, *ctx.static)


attend.differentiate(_setup_attend, _attend_grad, _attend_jvp)
attend_backward.differentiate_once()
attend_tangent.differentiate_once()

attend.count_flops(flops.attend)
attend_backward.count_flops(flops.attend_backward)
attend_tangent.count_flops(flops.attend_tangent)
