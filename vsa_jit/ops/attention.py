"""Attention of query blocks over the key blocks that were selected for them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vsa_jit import flops
from vsa_jit.backends.choose import backend_for, choose
from vsa_jit.checks import warn_of_layout
from vsa_jit.fastpath import are_plain, autocast_off, can_bypass_dispatcher, is_autocast_on, tracing_context
from vsa_jit.operators import Operator, save_tensors, tangent_or_zeros
from vsa_jit.problem import Operands, Problem, bhsd, contiguous_like, empty_like


@Operator
def attend(
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
    keep_out_s: bool,
    tile: Sequence[int],
    segments: Sequence[int] | None,
    layout: str,
    softmax_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of each query block over its key blocks, with the coarse output added where ``out_c`` is given.

    Args:
        out_c: [B, H, n_q, D], one row for each query block, weighted by ``gate`` (of q's shape) or else ``gate_value``.
            A gate of no dimensions, on the CPU, is a number too: one that ``torch.compile`` keeps symbolic.
        keep_out_s: also return the output before the coarse one was added, which the backward needs. Where gradients
            are recorded that is done without being asked.

    Returns:
        ``(out, lse, out_s)``: out like q; lse fp32 [B, H, S_q], natural log, -inf where a query has no key; out_s like
        q, or empty where it was not kept; it carries no derivative.
    """
    problem = Problem.of(q, k, tile, segments, layout, softmax_scale)
    operands = Operands(q, k, v, q2k_idx, q2k_num, q_sizes, kv_sizes, out_c, *_weight(gate, gate_value))
    out, lse, out_s = _attend(problem, backend, operands, keep_out_s)
    return out, lse, q.new_empty(0) if out_s is None else out_s


def _weight(gate: Tensor | None, gate_value: float) -> tuple[Tensor | None, float]:
    return (None, gate.item()) if gate is not None and gate.dim() == 0 else (gate, gate_value)


def _attend(
    problem: Problem, backend: str, operands: Operands, keep_out_s: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    return backend_for("attend", problem, backend, *operands[:3]).attend(problem, operands, keep_out_s)


class FastCall(NamedTuple):
    """A call that only kernels have to see; so do all that look like it, while nobody watches.

    Attributes:
        autocast: whether it was on; calls that look alike agree in that, since it is among their dispatch keys.
    """

    problem: Problem
    backend: str
    autocast: bool

    @classmethod
    def of(cls, problem: Problem, backend: str, tensors: Sequence[Tensor]) -> "FastCall | None":
        """None where somebody else has to see the call, or it computes nothing."""
        if problem.batch == 0 or not (can_bypass_dispatcher() and are_plain(tensors)):
            return None
        return cls(problem, backend, is_autocast_on(tensors[0].device))

    def attend(self, operands: Operands) -> tuple[Tensor, Tensor]:
        """The operator of that name, past PyTorch, without the coarse output: ``(out, lse)``."""
        if self.autocast:
            with autocast_off(operands.q.device):
                return _attend(self.problem, self.backend, operands, False)[:2]
        return _attend(self.problem, self.backend, operands, False)[:2]


@attend.fake
def _(q, k, v, q2k_idx, q2k_num, q_sizes, kv_sizes, out_c, gate, gate_value, keep_out_s, *static):
    problem = Problem.of(q, k, *static[:-1])
    # A program that is being compiled cannot warn by itself.
    if tracing_context() is not None:
        warn_of_layout(problem, stacklevel=2)
    lse = q.new_empty((problem.batch, problem.queries.heads, problem.queries.length), dtype=torch.float32)
    return empty_like(q), lse, empty_like(q) if keep_out_s else q.new_empty(0)


@Operator
def attend_backward(
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
    out_s: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``attend`` in q, k, v, the gate and ``out_c``; empty where there is none or it is not needed."""
    problem = Problem.of(q, k, tile, segments, layout, softmax_scale)
    operands = Operands(q, k, v, q2k_idx, q2k_num, q_sizes, kv_sizes, out_c, *_weight(gate, gate_value))
    run = backend_for("attend_backward", problem, backend, q, k, v)
    gradients = run.attend_backward(problem, operands, out_s, lse, dout, dlse, need_dq, need_dkv)
    dq, dk, dv, dgate, dout_c = (q.new_empty(0) if x is None else x for x in gradients)
    return dq, dk, dv, dgate, dout_c


@attend_backward.fake
def _(
    q,
    k,
    v,
    q2k_idx,
    q2k_num,
    q_sizes,
    kv_sizes,
    out_c,
    gate,
    gate_value,
    out_s,
    lse,
    dout,
    dlse,
    need_dq,
    need_dkv,
    *_,
):
    def gradient(x: Tensor | None, needed: bool, empty: Callable = empty_like) -> Tensor:
        return empty(x) if x is not None and needed else q.new_empty(0)

    gate = None if gate is None or gate.dim() == 0 else gate
    dgate, dout_c = (gradient(x, out_c is not None, contiguous_like) for x in (gate, out_c))
    return gradient(q, need_dq), gradient(k, need_dkv), gradient(v, need_dkv), dgate, dout_c


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
    """The tangents of ``attend``'s out and lse along those of q, k, v, out_c and the gate, each of its tensor's shape.

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
    operands = Operands(q, k, v, q2k_idx, q2k_num, q_sizes, kv_sizes, out_c, *_weight(gate, gate_value))
    run = backend_for("attend_tangent", problem, backend, q, k, v)
    return run.attend_tangent(problem, operands, q_t, k_t, v_t, out_c_t, gate_t)


@attend_tangent.fake
def _(q, k, v, q2k_idx, q2k_num, q_sizes, kv_sizes, out_c, gate, gate_value, q_t, k_t, v_t, out_c_t, gate_t, *static):
    return empty_like(q), q.new_empty(bhsd(q, static[2]).shape[:3], dtype=torch.float32)


def _with_what_the_backward_needs(args: tuple) -> tuple:
    """Of ``attend``: with a coarse output added, the output alone does not give the one before."""
    keep_out_s = args[7] is not None
    return *args[:10], keep_out_s or args[10], *args[11:]


def _setup_attend(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    tensors, (ctx.gate_value, _, *ctx.static) = inputs[:9], inputs[9:]
    out, lse, out_s = output
    ctx.mark_non_differentiable(out_s)
    out_c = tensors[7]
    save_tensors(ctx, *tensors, out if out_c is None else out_s, lse)


def _attend_grad(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _dout_s: None) -> tuple:
    *tensors, out_s, lse = ctx.saved_tensors
    need_q, need_k, need_v, *_, need_out_c, need_gate = ctx.needs_input_grad[:9]
    dout = torch.zeros_like(out_s) if dout is None else dout
    gradients = attend_backward(*tensors, ctx.gate_value, out_s, lse, dout, dlse, need_q, need_k or need_v, *ctx.static)
    needs = (need_q, need_k, need_v, need_gate, need_out_c)
    dq, dk, dv, dgate, dout_c = (x if needed else None for x, needed in zip(gradients, needs, strict=True))
    return dq, dk, dv, *(None,) * 4, dout_c, dgate, *(None,) * 7


def _attend_jvp(ctx: Any, saved: Sequence[Any], *tangents: Tensor | None) -> tuple:
    *tensors, _out_s, _lse = saved
    # Of q, k, v, the coarse output and the gate.
    along = (tangent_or_zeros(tangents[i], tensors[i]) for i in (0, 1, 2, 7, 8))
    out_t, lse_t = attend_tangent(*tensors, ctx.gate_value, *along, *ctx.static)
    return out_t, lse_t, None


attend.differentiate(_setup_attend, _attend_grad, _attend_jvp, _with_what_the_backward_needs)
attend_backward.differentiate_once()
attend_tangent.differentiate_once()

attend.count_flops(flops.attend)
attend_backward.count_flops(flops.attend_backward)
attend_tangent.count_flops(flops.attend_tangent)
