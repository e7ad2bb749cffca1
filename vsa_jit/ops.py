"""The operators that PyTorch sees: each has a fake implementation for tracing, and derivatives where there are any.

Every operator ends with the same five arguments: those of ``Problem.static``, which are the tile, the grid, the layout
and the softmax scale, and the backend asked for. Which backend runs is decided when the operator runs, from the device
of its tensors.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vsa_jit import flops
from vsa_jit.backends.choose import Backend, backend_for, choose
from vsa_jit.checks import warn_of_layout
from vsa_jit.fastpath import (
    are_plain,
    autocast_off,
    can_bypass_dispatcher,
    is_autocast_on,
    softmax_backward,
    tracing_context,
)
from vsa_jit.operators import Operator
from vsa_jit.problem import Operands, Problem, bhsd, empty_like

# Scores of block means that are computed at a time, so that they need little memory however many blocks there are.
SCORES_AT_A_TIME = 1 << 24


@Operator
def block_means(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    q_sizes: Tensor | None,
    kv_sizes: Tensor | None,
    tile: Sequence[int],
    grid: Sequence[int] | None,
    layout: str,
    softmax_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Means of the valid tokens of each block.

    Args:
        v: None where its means are not needed.
        q_sizes, kv_sizes: valid tokens of each block.

    Returns:
        ``(q_c, k_c, v_c)``: fp32 [B, H, n_q, D] and [B, H_kv, n_k, D], 0 for an empty block; v_c is empty without v.
    """
    problem = Problem.of(q, k, tile, grid, layout, softmax_scale)
    run = backend_for(problem, backend, q, k) if v is None else backend_for(problem, backend, q, k, v)
    q_c, k_c, v_c = run.block_means(problem, q, k, v, q_sizes, kv_sizes)
    return q_c, k_c, q.new_empty(0, dtype=torch.float32) if v_c is None else v_c


@block_means.fake
def _(q, k, v, q_sizes, kv_sizes, tile, grid, layout, softmax_scale, backend):
    problem = Problem.of(q, k, tile, grid, layout, softmax_scale)
    kv_shape = (problem.batch, problem.keys.heads, problem.keys.num_blocks, problem.head_dim)
    return (
        q.new_empty(
            (problem.batch, problem.queries.heads, problem.queries.num_blocks, problem.head_dim), dtype=torch.float32
        ),
        k.new_empty(kv_shape, dtype=torch.float32),
        q.new_empty(0 if v is None else kv_shape, dtype=torch.float32),
    )


@Operator
def block_mean_backward(
    dmean: Tensor,
    x: Tensor,
    sizes: Tensor | None,
    tile: Sequence[int],
    grid: Sequence[int] | None,
    layout: str,
    softmax_scale: float,
    backend: str,
) -> Tensor:
    """Gradient of the block means of ``x`` in ``x``: each valid token's share of its block's, 0 for the others."""
    problem = Problem.of(x, x, tile, grid, layout, softmax_scale)
    return backend_for(problem, backend, x).block_mean_backward(problem.queries, dmean, x, sizes)


@block_mean_backward.fake
def _(dmean, x, sizes, tile, grid, layout, softmax_scale, backend):
    return empty_like(x)


def _setup_block_means(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    q, k, v, q_sizes, kv_sizes, *ctx.static = inputs
    _save(ctx, q, k, v, q_sizes, kv_sizes)


def _block_means_grad(ctx: Any, dq_c: Tensor | None, dk_c: Tensor | None, dv_c: Tensor | None) -> tuple:
    q, k, v, q_sizes, kv_sizes = ctx.saved_tensors
    grads = [
        block_mean_backward(dmean, x, sizes, *ctx.static) if needed and dmean is not None else None
        for needed, dmean, x, sizes in zip(
            ctx.needs_input_grad, (dq_c, dk_c, dv_c), (q, k, v), (q_sizes, kv_sizes, kv_sizes), strict=False
        )
    ]
    return *grads, *(None,) * 7


def _block_means_jvp(
    ctx: Any, saved: Sequence[Any], q_t: Tensor | None, k_t: Tensor | None, v_t: Tensor | None, *_: None
) -> tuple:
    q, k, v, q_sizes, kv_sizes = saved
    tangents = (_or_zeros(x_t, x) for x_t, x in ((q_t, q), (k_t, k), (v_t, v)))
    return block_means(*tangents, q_sizes, kv_sizes, *ctx.static)


block_means.differentiate(_setup_block_means, _block_means_grad, _block_means_jvp)
block_mean_backward.differentiate_once()


@Operator
def coarse_attend(
    q_c: Tensor,
    k_c: Tensor,
    v_c: Tensor | None,
    q: Tensor,
    k: Tensor,
    kv_sizes: Tensor | None,
    topk: int,
    selection_dtype: torch.dtype,
    tile: Sequence[int],
    grid: Sequence[int] | None,
    layout: str,
    softmax_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Chooses the key blocks of each query block by the scores of their means, and attends the means.

    All arithmetic is in fp32, whatever precision PyTorch is allowed for its own products. With a narrower
    ``selection_dtype`` each result is rounded to it: the means, their products, the scaled scores, by which blocks are
    then chosen, the probabilities and the output. The rounding happens in here because ``torch.compile`` drops
    conversions to a narrower dtype and back. Derivatives are those of the unrounded operations at the rounded values.

    Args:
        q_c, k_c, v_c: block means, fp32; v_c None where the means are not attended.
        q, k: what they are the means of; they say what problem this is.
        kv_sizes: valid tokens of each key block; one without any is neither selected nor attended.
        topk: key blocks to select for each query block, clamped to n_k.

    Returns:
        ``(out_c, q2k_idx, q2k_num)``: fp32 [B, H, n_q, D], softmax(q_c k_cᵀ · scale) v_c, empty without v_c; int32
        [B, H, n_q, topk], the blocks of highest score q_c · k_c, ties to the lower, ascending, 0 past the number
        selected; int32 [B, H, n_q]. The selection carries no derivative.
    """
    problem = Problem.of(q, k, tile, grid, layout, softmax_scale)
    run = backend_for(problem, backend, q, k)
    # A program that was traced with a longer sequence may ask for more.
    topk = min(topk, problem.keys.num_blocks)
    shape = (problem.batch, problem.queries.heads, problem.queries.num_blocks)
    q2k_idx = q.new_empty((*shape, topk), dtype=torch.int32)
    q2k_num = q.new_empty(shape, dtype=torch.int32)
    out_c = q_c.new_empty(0 if v_c is None else q_c.shape)
    q_c, k_c, v_c = _rounded_means(selection_dtype, q_c, k_c, v_c)
    for q_rows, k_rows, v_rows, out_rows, idx, num in _scored_at_a_time(
        problem, q_c, k_c, v_c, None if v_c is None else out_c, q2k_idx, q2k_num
    ):
        scores = _scores(problem, run, q_rows, k_rows, selection_dtype)
        run.select(scores, kv_sizes, topk, idx, num)
        if v_c is not None:
            run.matmul(_softmax(problem, scores, kv_sizes, selection_dtype), v_rows, out_rows)
            _round_to(selection_dtype, out_rows)
    return out_c, q2k_idx, q2k_num


@coarse_attend.fake
def _(q_c, k_c, v_c, q, k, kv_sizes, topk, selection_dtype, *static):
    most = k_c.shape[2]
    topk = min(topk, most) if isinstance(topk, int) and isinstance(most, int) else topk
    return (
        q_c.new_empty(0 if v_c is None else q_c.shape),
        q_c.new_empty((*q_c.shape[:3], topk), dtype=torch.int32),
        q_c.new_empty(q_c.shape[:3], dtype=torch.int32),
    )


def _scored_at_a_time(problem: Problem, *tensors: Tensor | None) -> Iterator[list[Any]]:
    """Some key/value heads at a time: of each tensor the part that belongs to them, [rows, ..., last].

    The query heads of one key/value head are rows of one product.
    """
    rows = problem.batch * problem.keys.heads
    scores = problem.group * problem.queries.num_blocks * problem.keys.num_blocks
    step = max(1, SCORES_AT_A_TIME // scores)
    flat = [None if x is None else x.reshape(rows, -1, *x.shape[3:]) for x in tensors]
    for start in range(0, rows, step):
        yield [None if x is None else x[start : start + step] for x in flat]


def _round_to(dtype: torch.dtype, x: Tensor) -> Tensor:
    """Rounds an fp32 tensor to the values of a dtype, in place."""
    return x if dtype == x.dtype else x.copy_(x.to(dtype))


def _rounded_means(dtype: torch.dtype, *means: Tensor | None) -> list[Any]:
    return [x if x is None else x.to(dtype).float() for x in means]


def _scores(problem: Problem, run: Backend, q_rows: Tensor, k_rows: Tensor, selection_dtype: torch.dtype) -> Tensor:
    """The scores that order the key blocks: fp32 before scaling, a narrower dtype after, since its scaling can tie."""
    scores = run.matmul(q_rows, k_rows.mT)
    if selection_dtype == torch.float32:
        return scores
    return _round_to(selection_dtype, _round_to(selection_dtype, scores).mul_(problem.softmax_scale))


def _softmax(problem: Problem, scores: Tensor, kv_sizes: Tensor | None, selection_dtype: torch.dtype) -> Tensor:
    """Probabilities of the key blocks, from ``_scores``, which are overwritten."""
    if selection_dtype == torch.float32:
        scores.mul_(problem.softmax_scale)
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
    q: Tensor,
    k: Tensor,
    kv_sizes: Tensor | None,
    dout_c: Tensor,
    selection_dtype: torch.dtype,
    tile: Sequence[int],
    grid: Sequence[int] | None,
    layout: str,
    softmax_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the output of ``coarse_attend`` in q_c, k_c and v_c."""
    problem = Problem.of(q, k, tile, grid, layout, softmax_scale)
    run = backend_for(problem, backend, q, k)
    dq_c, dk_c, dv_c = map(_contiguous_like, (q_c, k_c, v_c))
    q_c, k_c, v_c = _rounded_means(selection_dtype, q_c, k_c, v_c)
    for q_rows, k_rows, v_rows, dout_rows, dq_rows, dk_rows, dv_rows in _scored_at_a_time(
        problem, q_c, k_c, v_c, dout_c.contiguous(), dq_c, dk_c, dv_c
    ):
        p = _softmax(problem, _scores(problem, run, q_rows, k_rows, selection_dtype), kv_sizes, selection_dtype)
        run.matmul(p.mT, dout_rows, dv_rows)
        dp = run.matmul(dout_rows * problem.softmax_scale, v_rows.mT)
        ds = softmax_backward(dp, p, -1, torch.float32)
        run.matmul(ds, k_rows, dq_rows)
        run.matmul(ds.mT, q_rows, dk_rows)
    return dq_c, dk_c, dv_c


@coarse_attend_backward.fake
def _(q_c, k_c, v_c, *_):
    return _contiguous_like(q_c), _contiguous_like(k_c), _contiguous_like(v_c)


@Operator
def coarse_attend_tangent(
    q_c: Tensor,
    k_c: Tensor,
    v_c: Tensor,
    q_c_t: Tensor,
    k_c_t: Tensor,
    v_c_t: Tensor,
    q: Tensor,
    k: Tensor,
    kv_sizes: Tensor | None,
    selection_dtype: torch.dtype,
    tile: Sequence[int],
    grid: Sequence[int] | None,
    layout: str,
    softmax_scale: float,
    backend: str,
) -> Tensor:
    """The tangent of the output of ``coarse_attend`` along those of q_c, k_c and v_c."""
    problem = Problem.of(q, k, tile, grid, layout, softmax_scale)
    run = backend_for(problem, backend, q, k)
    out_t = _contiguous_like(q_c)
    q_c, k_c, v_c = _rounded_means(selection_dtype, q_c, k_c, v_c)
    for q_rows, k_rows, v_rows, q_t, k_t, v_t, out_rows in _scored_at_a_time(
        problem, q_c, k_c, v_c, q_c_t, k_c_t, v_c_t, out_t
    ):
        p = _softmax(problem, _scores(problem, run, q_rows, k_rows, selection_dtype), kv_sizes, selection_dtype)
        scores_t = (run.matmul(q_t, k_rows.mT) + run.matmul(q_rows, k_t.mT)) * problem.softmax_scale
        p_t = p * (scores_t - (p * scores_t).sum(-1, keepdim=True))
        out_rows.copy_(run.matmul(p_t, v_rows) + run.matmul(p, v_t))
    return out_t


@coarse_attend_tangent.fake
def _(q_c, *_):
    return _contiguous_like(q_c)


def _setup_coarse_attend(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    tensors, (_, *ctx.static) = inputs[:6], inputs[6:]
    v_c = tensors[2]
    ctx.mark_non_differentiable(*(output if v_c is None else output[1:]))
    _save(ctx, *tensors)


def _coarse_attend_grad(ctx: Any, dout_c: Tensor | None, *_: None) -> tuple:
    if dout_c is None:
        return (None,) * 13
    grads = coarse_attend_backward(*ctx.saved_tensors, dout_c, *ctx.static)
    return *grads, *(None,) * 10


def _coarse_attend_jvp(
    ctx: Any, saved: Sequence[Any], q_t: Tensor | None, k_t: Tensor | None, v_t: Tensor | None, *_: None
) -> tuple:
    q_c, k_c, v_c, q, k, kv_sizes = saved
    if v_c is None:
        return None, None, None
    tangents = (_or_zeros(x_t, x) for x_t, x in ((q_t, q_c), (k_t, k_c), (v_t, v_c)))
    return coarse_attend_tangent(q_c, k_c, v_c, *tangents, q, k, kv_sizes, *ctx.static), None, None


coarse_attend.differentiate(_setup_coarse_attend, _coarse_attend_grad, _coarse_attend_jvp)
coarse_attend_backward.differentiate_once()
coarse_attend_tangent.differentiate_once()


@Operator
def compact(
    block_map: Tensor,
    q: Tensor,
    k: Tensor,
    tile: Sequence[int],
    grid: Sequence[int] | None,
    layout: str,
    softmax_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The set columns of each row of a bool map [B, H, n_q, n_k] as ``(q2k_idx, q2k_num)``: int32 [B, H, n_q, n_k],
    ascending, 0 past the number set; int32 [B, H, n_q]. ``q`` and ``k`` say what problem the map belongs to."""
    problem = Problem.of(q, k, tile, grid, layout, softmax_scale)
    q2k_idx = block_map.new_empty(block_map.shape, dtype=torch.int32)
    q2k_num = block_map.new_empty(block_map.shape[:3], dtype=torch.int32)
    backend_for(problem, backend, q, k).compact(block_map, q2k_idx, q2k_num)
    return q2k_idx, q2k_num


@compact.fake
def _(block_map, q, k, tile, grid, layout, softmax_scale, backend):
    return (
        block_map.new_empty(block_map.shape, dtype=torch.int32),
        block_map.new_empty(block_map.shape[:3], dtype=torch.int32),
    )


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
    grid: Sequence[int] | None,
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
    problem = Problem.of(q, k, tile, grid, layout, softmax_scale)
    operands = Operands(q, k, v, q2k_idx, q2k_num, q_sizes, kv_sizes, out_c, *_weight(gate, gate_value))
    out, lse, out_s = _forward(problem, backend, operands, keep_out_s)
    return out, lse, q.new_empty(0) if out_s is None else out_s


def _weight(gate: Tensor | None, gate_value: float) -> tuple[Tensor | None, float]:
    return (None, gate.item()) if gate is not None and gate.dim() == 0 else (gate, gate_value)


def _forward(
    problem: Problem, backend: str, operands: Operands, keep_out_s: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    return backend_for(problem, backend, *operands[:3]).forward(problem, operands, keep_out_s)


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
                return _forward(self.problem, self.backend, operands, False)[:2]
        return _forward(self.problem, self.backend, operands, False)[:2]


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
    grid: Sequence[int] | None,
    layout: str,
    softmax_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``attend`` in q, k, v, the gate and ``out_c``; empty where there is none or it is not needed."""
    problem = Problem.of(q, k, tile, grid, layout, softmax_scale)
    operands = Operands(q, k, v, q2k_idx, q2k_num, q_sizes, kv_sizes, out_c, *_weight(gate, gate_value))
    gradients = backend_for(problem, backend, q, k, v).backward(
        problem, operands, out_s, lse, dout, dlse, need_dq, need_dkv
    )
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
    dgate, dout_c = (gradient(x, out_c is not None, _contiguous_like) for x in (gate, out_c))
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
    grid: Sequence[int] | None,
    layout: str,
    softmax_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The tangents of ``attend``'s out and lse along those of q, k, v, out_c and the gate, each of its tensor's shape.

    Raises:
        NotImplementedError: the call runs on another backend than ``torch``.
    """
    problem = Problem.of(q, k, tile, grid, layout, softmax_scale)
    chosen = choose(problem, backend, q.device, q.dtype, (q, k, v)).backend
    if chosen != "torch":
        raise NotImplementedError(
            "vsa_jit: forward-mode differentiation (jvp) runs on backend 'torch' only, and this call runs on "
            f"{chosen!r}; pass backend='torch'"
        )
    from vsa_jit.backends import torch_tangent

    operands = Operands(q, k, v, q2k_idx, q2k_num, q_sizes, kv_sizes, out_c, *_weight(gate, gate_value))
    return torch_tangent.attend(problem, operands, q_t, k_t, v_t, out_c_t, gate_t)


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
    _save(ctx, *tensors, out if out_c is None else out_s, lse)


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
    along = (_or_zeros(tangents[i], tensors[i]) for i in (0, 1, 2, 7, 8))
    out_t, lse_t = attend_tangent(*tensors, ctx.gate_value, *along, *ctx.static)
    return out_t, lse_t, None


attend.differentiate(_setup_attend, _attend_grad, _attend_jvp, _with_what_the_backward_needs)
attend_backward.differentiate_once()
attend_tangent.differentiate_once()


def _contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx: Any, *tensors: Tensor | None) -> None:
    """For both kinds of derivatives."""
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _or_zeros(tangent: Tensor | None, x: Tensor | None) -> Tensor | None:
    if x is None:
        return None
    # Kernels read a contiguous last dimension, which was checked of ``x`` alone.
    return torch.zeros_like(x) if tangent is None else tangent.contiguous()


flops.tell_counters()
