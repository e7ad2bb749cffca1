"""Video Sparse Attention as one operator: block means, selection, attention, and the coarse output that is added."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from vsa_jit import flops
from vsa_jit.backends.base import Backend, Whole
from vsa_jit.backends.choose import backends_for
from vsa_jit.fastpath import are_plain, can_bypass_dispatcher
from vsa_jit.operators import Operator, save_tensors, tangent_or_zeros
from vsa_jit.ops.attention import attend_tangent, warn_in_compiled_program, weight_of
from vsa_jit.ops.pooling import block_means
from vsa_jit.ops.selection import coarse_attend_tangent
from vsa_jit.problem import (
    Coarse,
    MeanGradients,
    Operands,
    Problem,
    contiguous_like,
    empty_like,
    has_coarse_output,
    keeps_out_s,
)
from vsa_jit.segments import width_of_selection

# Arguments of the operator that are tensors, or None: q, k, v, the gate, and the sizes of query and key blocks.
TENSORS = 6
GATE = 3
# Those that are numbers before the arguments that all operators on tokens end with.
NUMBERS = 5


class CoarseResults(NamedTuple):
    """Of ``coarse_branch``; shapes as ``Backend`` returns them."""

    q_c: Tensor
    k_c: Tensor
    v_c: Tensor | None
    out_c: Tensor | None
    q2k_idx: Tensor
    q2k_num: Tensor


class Kept(NamedTuple):
    """The output, and what a backward needs of it; shapes as ``Backend`` returns them.

    Attributes:
        out: None for a backward that has ``out_s``.
        q_c, k_c, v_c, out_c: block means and the coarse output; None where that is not added.
        out_s: the output before the coarse one was added, see ``keeps_out_s``.
    """

    out: Tensor | None
    lse: Tensor
    q2k_idx: Tensor
    q2k_num: Tensor
    q_c: Tensor | None = None
    k_c: Tensor | None = None
    v_c: Tensor | None = None
    out_c: Tensor | None = None
    out_s: Tensor | None = None


def coarse_branch(
    run: Mapping[str, Backend],
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    q_sizes: Tensor | None,
    kv_sizes: Tensor | None,
    topk: Sequence[int],
    compete: bool,
    selection_dtype: torch.dtype,
) -> CoarseResults:
    """Block means, the key blocks that they select, and the attention among them.

    Args:
        run: the functions of each operator.
        v: None where the means are not attended.
        topk: key blocks to select for each query block, clamped to n_k. With segments, key blocks of video, one number
            for each sample.
        compete: whether blocks of context have to be among those of highest score, as many more; else all are selected.
        selection_dtype: to which each step is rounded, see ``vsa_jit.video_sparse_attn``.
    """
    coarse = Coarse(problem.keys.segments, problem.softmax_scale, selection_dtype)
    means = run["block_means"].block_means(problem, q, k, v, q_sizes, kv_sizes)
    return CoarseResults(*means, *run["coarse_attend"].coarse_attend(coarse, *means, kv_sizes, topk, compete))


@Operator
def select_key_blocks(
    q: Tensor,
    k: Tensor,
    q_sizes: Tensor | None,
    kv_sizes: Tensor | None,
    topk: Sequence[int],
    compete: bool,
    selection_dtype: torch.dtype,
    tile: Sequence[int],
    segments: Sequence[int] | None,
    layout: str,
    softmax_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The key blocks that ``video_sparse_attn`` selects, ``(q2k_idx, q2k_num)``, without a derivative."""
    problem = Problem.of(q, k, tile, segments, layout, softmax_scale)
    run = backends_for(problem, backend, q, k)
    results = coarse_branch(run, problem, q, k, None, q_sizes, kv_sizes, topk, compete, selection_dtype)
    return results.q2k_idx, results.q2k_num


@select_key_blocks.fake
def _(q, k, q_sizes, kv_sizes, topk, compete, selection_dtype, *static):
    problem = Problem.of(q, k, *static[:-1])
    rows = problem.map_shape[:3]
    width = width_of_selection(problem.keys.segments, topk, problem.keys.num_blocks)
    return q.new_empty((*rows, width), dtype=torch.int32), q.new_empty(rows, dtype=torch.int32)


@Operator
def video_sparse_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    q_sizes: Tensor | None,
    kv_sizes: Tensor | None,
    gate_value: float,
    topk: Sequence[int],
    compete: bool,
    selection_dtype: torch.dtype,
    for_backward: bool,
    tile: Sequence[int],
    segments: Sequence[int] | None,
    layout: str,
    softmax_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The public function of that name, whose arguments were checked.

    Args:
        gate: of q's shape; or of no dimensions, see ``weight_of``; None where ``gate_value`` is the weight.
        topk, compete, selection_dtype: as in ``coarse_branch``.
        for_backward: also return all that the backward needs. Where gradients are recorded that is done without being
            asked.

    Returns:
        The tensors of ``Kept``. Only the output carries a derivative.
    """
    problem = Problem.of(q, k, tile, segments, layout, softmax_scale)
    run = backends_for(problem, backend, q, k, v)
    with_out_s = for_backward and keeps_out_s(gate, gate_value)
    gate, gate_value = weight_of(gate, gate_value)
    with_coarse = has_coarse_output(gate, gate_value)
    q_c, k_c, v_c, out_c, q2k_idx, q2k_num = coarse_branch(
        run, problem, q, k, v if with_coarse else None, q_sizes, kv_sizes, topk, compete, selection_dtype
    )
    means = (q_c, k_c, v_c, out_c) if for_backward and with_coarse else (None,) * 4
    # Without a backward their memory is free again before the output needs some.
    del q_c, k_c, v_c
    operands = Operands(q, k, v, q2k_idx, q2k_num, q_sizes, kv_sizes, out_c, gate, gate_value)
    out, lse, out_s = run["attend"].attend(problem, operands, with_out_s)
    return cast(Any, (out, lse, q2k_idx, q2k_num, *means, out_s))


@video_sparse_attn.fake
def _(q, k, v, gate, q_sizes, kv_sizes, gate_value, topk, compete, selection_dtype, for_backward, *static):
    problem = Problem.of(q, k, *static[:-1])
    warn_in_compiled_program(problem)
    batch, queries, keys = problem.batch, problem.queries, problem.keys
    rows = (batch, queries.heads, queries.num_blocks)
    of_keys = (batch, keys.heads, keys.num_blocks, problem.head_dim)
    of_queries = (*rows, problem.head_dim)
    means = [q.new_empty(0) for _ in range(4)]
    if for_backward and has_coarse_output(gate, gate_value):
        means = [q.new_empty(shape, dtype=torch.float32) for shape in (of_queries, of_keys, of_keys, of_queries)]
    return (
        empty_like(q),
        q.new_empty((batch, queries.heads, queries.length), dtype=torch.float32),
        q.new_empty((*rows, width_of_selection(keys.segments, topk, keys.num_blocks)), dtype=torch.int32),
        q.new_empty(rows, dtype=torch.int32),
        *means,
        empty_like(q) if for_backward and keeps_out_s(gate, gate_value) else q.new_empty(0),
    )


@Operator
def video_sparse_attn_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    q_sizes: Tensor | None,
    kv_sizes: Tensor | None,
    out: Tensor | None,
    lse: Tensor,
    q2k_idx: Tensor,
    q2k_num: Tensor,
    q_c: Tensor | None,
    k_c: Tensor | None,
    v_c: Tensor | None,
    out_c: Tensor | None,
    out_s: Tensor | None,
    dout: Tensor,
    gate_value: float,
    selection_dtype: torch.dtype,
    need_dq: bool,
    need_dkv: bool,
    tile: Sequence[int],
    segments: Sequence[int] | None,
    layout: str,
    softmax_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``video_sparse_attn`` in q, k, v and the gate; empty where there is none or it is not needed.

    Args:
        out, lse, q2k_idx, q2k_num, q_c, k_c, v_c, out_c, out_s: of the forward, see ``Kept``.
    """
    problem = Problem.of(q, k, tile, segments, layout, softmax_scale)
    run = backends_for(problem, backend, q, k, v)
    gate, gate_value = weight_of(gate, gate_value)
    mean_gradients: MeanGradients | None = None
    if q_c is not None and k_c is not None and v_c is not None:
        coarse = Coarse(problem.keys.segments, softmax_scale, selection_dtype)
        backward = run["coarse_attend_backward"].coarse_attend_backward
        mean_gradients = cast(MeanGradients, functools.partial(backward, coarse, q_c, k_c, v_c, kv_sizes))
    gradients = run["attend_backward"].attend_backward(
        problem,
        Operands(q, k, v, q2k_idx, q2k_num, q_sizes, kv_sizes, out_c, gate, gate_value),
        cast(Tensor, out if out_s is None else out_s),
        lse,
        dout,
        None,
        need_dq,
        need_dkv,
        is_combined=out_c is not None and out_s is None,
        mean_gradients=mean_gradients,
    )
    return cast(Any, gradients[:4])


@video_sparse_attn_backward.fake
def _(q, k, v, gate, *others):
    need_dq, need_dkv = others[-7:-5]
    needs = ((q, need_dq), (k, need_dkv), (v, need_dkv))
    dq, dk, dv = (empty_like(x) if needed else q.new_empty(0) for x, needed in needs)
    has_gate = gate is not None and gate.dim() > 0
    return dq, dk, dv, contiguous_like(gate) if has_gate else q.new_empty(0)


def run_directly(
    problem: Problem, backend: str, numbers: tuple, is_recorded: bool, q: Tensor, k: Tensor, v: Tensor, *others: Any
) -> Tensor:
    """The output of ``video_sparse_attn``, past PyTorch's dispatcher.

    Args:
        numbers: the operator's arguments between its tensors and those of ``Problem.static``.
        is_recorded: whether the tensors need a gradient.
        others: the gate and the sizes of query and key blocks.
    """
    gate_value, topk, compete, selection_dtype, _ = numbers
    whole_of = backends_for(problem, backend, q, k, v)["attend"].whole
    if whole_of is not None:
        has_gate = others[0] is not None
        settings = tuple(topk), compete, selection_dtype, gate_value, has_gate, is_recorded
        whole = whole_of(problem, *settings, q.get_device())
        if whole is not None:
            if is_recorded:
                return cast(Tensor, _Whole.apply(whole, (numbers, problem, backend), q, k, v, *others))
            return whole.forward(q, k, v, *others)[0]
    args = (q, k, v, *others, *numbers, *problem.static, backend)
    return video_sparse_attn.call_directly(is_recorded, *args)[0]


class _Whole(torch.autograd.Function):
    """Calls of a backend's ``Whole`` whose gradients are recorded."""

    @staticmethod
    def forward(ctx: Any, whole: Whole, call: tuple, *tensors: Any) -> Tensor:
        out, out_s, memory = whole.forward(*tensors)
        ctx.whole, ctx.call = whole, call
        ctx.save_for_backward(*tensors, out if out_s is None else out_s, memory)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        *tensors, out, memory = ctx.saved_tensors
        _, _, *needs = ctx.needs_input_grad[: 2 + GATE + 1]
        need_dq, need_dkv = needs[0], needs[1] or needs[2]
        # Who packs and unpacks saved tensors may have put them where kernels cannot read them.
        can_read = ctx.whole.can_read(*tensors[:3], memory)
        if can_read and can_bypass_dispatcher() and not torch.is_grad_enabled() and are_plain(grads):
            gradients = ctx.whole.backward(tensors, out, memory, *grads, need_dq, need_dkv)
        else:
            (gate_value, _, _, selection_dtype, _), problem, backend = ctx.call
            lse, q2k_idx, q2k_num, out_c, *means = ctx.whole.tensors(memory if can_read else memory.clone())
            outs = (None, out) if keeps_out_s(tensors[GATE], gate_value) else (out, None)
            kept = outs[0], lse, q2k_idx, q2k_num, *means, out_c, outs[1]
            numbers = gate_value, selection_dtype, need_dq, need_dkv, *problem.static, backend
            gradients = video_sparse_attn_backward(*tensors, *kept, *grads, *numbers)
        dq, dk, dv, dgate = (x if needed else None for x, needed in zip(gradients, needs, strict=False))
        return None, None, dq, dk, dv, dgate, None, None


def _recorded(args: tuple) -> tuple:
    for_backward = TENSORS + NUMBERS - 1
    return *args[:for_backward], True, *args[for_backward + 1 :]


def _setup(ctx: Any, inputs: tuple, output: Sequence[Tensor]) -> None:
    ctx.gate_value, _topk, _compete, ctx.selection_dtype, _for_backward, *ctx.static = inputs[TENSORS:]
    ctx.mark_non_differentiable(*(x for x in output[1:] if x is not None))
    kept, gate = Kept(*output), inputs[GATE]
    # Through PyTorch's dispatcher a result that there is not came as an empty one.
    if keeps_out_s(gate, ctx.gate_value):
        kept = kept._replace(out=None)
    elif has_coarse_output(gate, ctx.gate_value):
        kept = kept._replace(out_s=None)
    else:
        kept = kept._replace(q_c=None, k_c=None, v_c=None, out_c=None, out_s=None)
    save_tensors(ctx, *inputs[:TENSORS], *kept)


def _grad(ctx: Any, dout: Tensor | None, *_: None) -> tuple:
    none = (None,) * (TENSORS + NUMBERS + len(ctx.static))
    if dout is None:
        return none
    needs = ctx.needs_input_grad[: GATE + 1]
    gradients = video_sparse_attn_backward.call_in_backward(
        ctx,
        (dout,),
        *ctx.saved_tensors,
        dout,
        ctx.gate_value,
        ctx.selection_dtype,
        needs[0],
        needs[1] or needs[2],
        *ctx.static,
    )
    return *(x if needed else None for x, needed in zip(gradients, needs, strict=True)), *none[GATE + 1 :]


def _jvp(ctx: Any, saved: Sequence[Any], *tangents: Tensor | None) -> tuple:
    (q, k, v, gate, q_sizes, kv_sizes), kept = saved[:TENSORS], Kept(*saved[TENSORS:])
    q_t, k_t, v_t, gate_t = (tangent_or_zeros(t, x) for t, x in zip(tangents[: GATE + 1], saved, strict=False))
    tile, segments, _, softmax_scale, backend = ctx.static
    out_c_t = None
    if kept.out_c is not None:
        means_t = block_means(q_t, k_t, v_t, q_sizes, kv_sizes, *ctx.static)
        of_blocks = ctx.selection_dtype, tile, segments, softmax_scale, backend
        out_c_t = coarse_attend_tangent(kept.q_c, kept.k_c, kept.v_c, *means_t, kv_sizes, *of_blocks)
    operands = q, k, v, kept.q2k_idx, kept.q2k_num, q_sizes, kv_sizes, kept.out_c, gate, ctx.gate_value
    out_t, _ = attend_tangent(*operands, q_t, k_t, v_t, out_c_t, gate_t, *ctx.static)
    return out_t, *(None,) * (len(kept) - 1)


video_sparse_attn.differentiate(_setup, _grad, _jvp, _recorded, first_alone=True)
video_sparse_attn_backward.differentiate_once()

select_key_blocks.count_flops(flops.select_key_blocks)
video_sparse_attn.count_flops(flops.video_sparse_attn)
video_sparse_attn_backward.count_flops(flops.video_sparse_attn_backward)
