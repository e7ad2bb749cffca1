"""The operators that PyTorch sees: each has a fake implementation for tracing, and autograd where it is differentiable.

Every operator ends with the same five arguments, ``Problem.static``: the tile, the grid, the layout, the softmax scale
and the backend asked for. Which backend runs is decided when the operator runs, from the device of its tensors.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, library
from torch.autograd import forward_ad, profiler

from vsa_jit.backends.choose import backend_for
from vsa_jit.lookalikes import PLAIN
from vsa_jit.problem import Operands, Problem, bhsd, empty_like

# Scores that are computed at a time, so that selection needs little memory however many blocks there are.
SCORES_AT_A_TIME = 1 << 24


_LIBRARY = library.Library("vsa_jit", "DEF")


def autocast_off(device: torch.device) -> AbstractContextManager:
    """Where autocast is on for a device, turns it off."""
    return torch.autocast(device.type, enabled=False) if _is_autocast_on(device) else nullcontext()


def _is_autocast_on(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def nobody_watches() -> bool:
    """Whether nobody traces, transforms or watches what this thread does."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or profiler._is_profiler_enabled
        or torch.autograd._profiler_enabled()
        or torch.jit.is_tracing()
    )


def _are_plain(args: Sequence[Any]) -> bool:
    """Whether the tensors among arguments are what their memory holds, and no gradient is recorded for them."""
    recorded, others = torch.is_grad_enabled(), _keys_of_others()
    # A loop, which is quicker than a generator: this runs at every call.
    for x in args:
        if isinstance(x, Tensor) and (
            type(x) not in PLAIN or torch._C._dispatch_keys(x).raw_repr() & others or (recorded and x.requires_grad)
        ):
            return False
    return True


@functools.cache
def _keys_of_others() -> int:
    """PyTorch's dispatch keys but those of a tensor whose values are what its memory holds."""
    names = ("CPU", "CUDA", "ADInplaceOrView", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA")
    keys = (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)).raw_repr() for name in names)
    return ~functools.reduce(operator.or_, keys)


class _Operator:
    """A function as an operator of its name, with the schema of its annotations, on every device.

    The same as PyTorch's ``custom_op`` but for that one's checks at every call, which cost more than a launch. So does
    the way through PyTorch's dispatcher, which only those calls take that somebody else has to see. Inside, autocast is
    off: an operator computes in the dtype of its inputs and in fp32, whatever surrounds the call.
    """

    def __init__(self, function: Callable) -> None:
        self._function = function
        name = function.__name__
        schema = library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, self._run, "CompositeExplicitAutograd")
        self.overload = getattr(torch.ops.vsa_jit, name).default

    def _run(self, *args: Any) -> Any:
        with autocast_off(args[0].device):
            return self._function(*args)

    def __call__(self, *args: Any) -> Any:
        return self._run(*args) if nobody_watches() and _are_plain(args) else self.overload(*args)


def _fake(op: _Operator) -> Callable:
    return library.register_fake(op.overload, lib=_LIBRARY)


def _autograd(op: _Operator, backward: Callable, setup_context: Callable | None = None) -> None:
    library.register_autograd(op.overload, backward, setup_context=setup_context, lib=_LIBRARY)


def _refuse_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("vsa_jit: the gradients of sparse attention cannot be differentiated again")


@_Operator
def pool_and_select(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    q_sizes: Tensor | None,
    kv_sizes: Tensor | None,
    topk: int,
    tile: Sequence[int],
    grid: Sequence[int] | None,
    layout: str,
    softmax_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Block means, and for each query block the ``topk`` key blocks of highest score q_c · k_c, ties to the lower.

    Args:
        v: None where its means are not needed.
        q_sizes, kv_sizes: valid tokens of each block; a key block without any is never selected.

    Returns:
        ``(q_c, k_c, v_c, q2k_idx, q2k_num)``: fp32 [B, H, n_q, D] and [B, H_kv, n_k, D], means of the valid tokens, 0
        for an empty block (v_c is empty without v); int32 [B, H, n_q, topk], ascending, 0 past the number selected;
        int32 [B, H, n_q]. The means are differentiable, the selection is not.
    """
    problem = Problem.of(q, k, tile, grid, layout, softmax_scale, backend)
    run = backend_for(problem, q, k) if v is None else backend_for(problem, q, k, v)
    q_c, k_c, v_c = run.block_means(problem, q, k, v, q_sizes, kv_sizes)
    rows = problem.batch * problem.kv_heads
    shape = (problem.batch, problem.heads, problem.num_q_blocks)
    q2k_idx = q.new_empty((*shape, topk), dtype=torch.int32)
    q2k_num = q.new_empty(shape, dtype=torch.int32)
    # The query heads of one key/value head are rows of one product.
    q_rows, k_rows = q_c.view(rows, -1, problem.head_dim), k_c.view(rows, -1, problem.head_dim)
    idx, num = q2k_idx.view(rows, -1, topk), q2k_num.view(rows, -1)
    step = max(1, SCORES_AT_A_TIME // (q_rows.shape[1] * k_rows.shape[1]))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        run.select(q_rows[part] @ k_rows[part].mT, kv_sizes, topk, idx[part], num[part])
    return q_c, k_c, q.new_empty(0, dtype=torch.float32) if v_c is None else v_c, q2k_idx, q2k_num


@_fake(pool_and_select)
def _(q, k, v, q_sizes, kv_sizes, topk, tile, grid, layout, softmax_scale, backend):
    problem = Problem.of(q, k, tile, grid, layout, softmax_scale, backend)
    rows = (problem.batch, problem.heads, problem.num_q_blocks)
    kv_rows = (problem.batch, problem.kv_heads, problem.num_kv_blocks)
    return (
        q.new_empty((*rows, problem.head_dim), dtype=torch.float32),
        k.new_empty((*kv_rows, problem.head_dim), dtype=torch.float32),
        q.new_empty(0 if v is None else (*kv_rows, problem.head_dim), dtype=torch.float32),
        q.new_empty((*rows, topk), dtype=torch.int32),
        q.new_empty(rows, dtype=torch.int32),
    )


@_Operator
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
    problem = Problem.of(x, x, tile, grid, layout, softmax_scale, backend)
    return backend_for(problem, x).block_mean_backward(problem, dmean, x, sizes)


@_fake(block_mean_backward)
def _(dmean, x, sizes, tile, grid, layout, softmax_scale, backend):
    return empty_like(x)


def _setup_pool_and_select(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    q, k, v, q_sizes, kv_sizes, _, *ctx.static = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[3], output[4])
    ctx.save_for_backward(q, k, v, q_sizes, kv_sizes)


def _pool_and_select_grad(ctx: Any, dq_c: Tensor | None, dk_c: Tensor | None, dv_c: Tensor | None, *_: None) -> tuple:
    q, k, v, q_sizes, kv_sizes = ctx.saved_tensors
    grads = [
        block_mean_backward(dmean, x, sizes, *ctx.static) if needed and dmean is not None else None
        for needed, dmean, x, sizes in zip(
            ctx.needs_input_grad, (dq_c, dk_c, dv_c), (q, k, v), (q_sizes, kv_sizes, kv_sizes), strict=False
        )
    ]
    return *grads, *(None,) * 8


_autograd(pool_and_select, _pool_and_select_grad, _setup_pool_and_select)


@_Operator
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
    problem = Problem.of(q, k, tile, grid, layout, softmax_scale, backend)
    q2k_idx = block_map.new_empty(block_map.shape, dtype=torch.int32)
    q2k_num = block_map.new_empty(block_map.shape[:3], dtype=torch.int32)
    backend_for(problem, q, k).compact(block_map, q2k_idx, q2k_num)
    return q2k_idx, q2k_num


@_fake(compact)
def _(block_map, q, k, tile, grid, layout, softmax_scale, backend):
    return (
        block_map.new_empty(block_map.shape, dtype=torch.int32),
        block_map.new_empty(block_map.shape[:3], dtype=torch.int32),
    )


@_Operator
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
        keep_out_s: also return the output before the coarse one was added, which the backward needs.

    Returns:
        ``(out, lse, out_s)``: out like q; lse fp32 [B, H, S_q], natural log, -inf where a query has no key; out_s like
        q, or empty where it was not asked for.
    """
    problem = Problem.of(q, k, tile, grid, layout, softmax_scale, backend)
    operands = Operands(q, k, v, q2k_idx, q2k_num, q_sizes, kv_sizes, out_c, gate, gate_value)
    out, lse, out_s = _forward(problem, operands, keep_out_s)
    return out, lse, q.new_empty(0) if out_s is None else out_s


def _forward(problem: Problem, operands: Operands, keep_out_s: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    return backend_for(problem, *operands[:3]).forward(problem, operands, keep_out_s)


class PlainCall(NamedTuple):
    """A call that only kernels have to see; so do all that look like it, while nobody watches.

    Attributes:
        autocast: whether it was on; calls that look alike agree in that, since it is among their dispatch keys.
    """

    problem: Problem
    autocast: bool

    @classmethod
    def of(cls, problem: Problem, tensors: Sequence[Tensor]) -> "PlainCall | None":
        """None where somebody else has to see the call."""
        return cls(problem, _is_autocast_on(tensors[0].device)) if nobody_watches() and _are_plain(tensors) else None

    def attend(self, operands: Operands) -> tuple[Tensor, Tensor]:
        """The operator of that name, past PyTorch, without the coarse output: ``(out, lse)``."""
        if self.autocast:
            with autocast_off(operands.q.device):
                return _forward(self.problem, operands, False)[:2]
        return _forward(self.problem, operands, False)[:2]


@_fake(attend)
def _(q, k, v, q2k_idx, q2k_num, q_sizes, kv_sizes, out_c, gate, gate_value, keep_out_s, tile, grid, layout, *_):
    lse = q.new_empty(bhsd(q, layout).shape[:3], dtype=torch.float32)
    return empty_like(q), lse, empty_like(q) if keep_out_s else q.new_empty(0)


@_Operator
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
    problem = Problem.of(q, k, tile, grid, layout, softmax_scale, backend)
    operands = Operands(q, k, v, q2k_idx, q2k_num, q_sizes, kv_sizes, out_c, gate, gate_value)
    gradients = backend_for(problem, q, k, v).backward(problem, operands, out_s, lse, dout, dlse, need_dq, need_dkv)
    dq, dk, dv, dgate, dout_c = (q.new_empty(0) if x is None else x for x in gradients)
    return dq, dk, dv, dgate, dout_c


@_fake(attend_backward)
def _(
    q, k, v, q2k_idx, q2k_num, q_sizes, kv_sizes, out_c, gate, gate_value, out_s, lse, dout, dlse, need_dq, need_dkv, *_
):
    def gradient(x: Tensor | None, needed: bool, empty: Callable = empty_like) -> Tensor:
        return empty(x) if x is not None and needed else q.new_empty(0)

    contiguous = functools.partial(torch.empty_like, memory_format=torch.contiguous_format)
    dgate, dout_c = (gradient(x, out_c is not None, contiguous) for x in (gate, out_c))
    return gradient(q, need_dq), gradient(k, need_dkv), gradient(v, need_dkv), dgate, dout_c


def _setup_attend(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    tensors, (gate_value, keep_out_s, *static) = inputs[:9], inputs[9:]
    out, lse, out_s = output
    ctx.set_materialize_grads(False)
    ctx.gate_value, ctx.static = gate_value, static
    ctx.save_for_backward(*tensors, out_s if keep_out_s else out, lse)


def _attend_grad(ctx: Any, dout: Tensor | None, dlse: Tensor | None, dout_s: Tensor | None) -> tuple:
    *tensors, out_s, lse = ctx.saved_tensors
    need_dq, need_dkv = ctx.needs_input_grad[0], ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    dout = torch.zeros_like(out_s) if dout is None else dout
    gradients = attend_backward(*tensors, ctx.gate_value, out_s, lse, dout, dlse, need_dq, need_dkv, *ctx.static)
    dq, dk, dv, dgate, dout_c = (x if x.numel() > 0 else None for x in gradients)
    return dq, dk, dv, *(None,) * 4, dout_c, dgate, *(None,) * 7


_autograd(attend, _attend_grad, _setup_attend)
_autograd(attend_backward, _refuse_second_derivative)
_autograd(block_mean_backward, _refuse_second_derivative)
