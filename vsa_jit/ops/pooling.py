"""Means of blocks: what the selection and the coarse output are made of.

Operators that read tokens, here and in ``attention``, end with the same five arguments: those of ``Problem.static``,
which are the tile, the segments, the layout and the softmax scale, and the backend asked for. Which backend runs is
decided when the operator runs, from its tensors.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from vsa_jit.backends.choose import backend_for
from vsa_jit.operators import Operator, save_tensors, tangent_or_zeros
from vsa_jit.problem import Problem, empty_like


@Operator
def block_means(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    q_sizes: Tensor | None,
    kv_sizes: Tensor | None,
    tile: Sequence[int],
    segments: Sequence[int] | None,
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
    problem = Problem.of(q, k, tile, segments, layout, softmax_scale)
    tensors = (q, k) if v is None else (q, k, v)
    run = backend_for("block_means", problem, backend, *tensors)
    return cast(Any, run.block_means(problem, q, k, v, q_sizes, kv_sizes))


@block_means.fake
def _(q, k, v, q_sizes, kv_sizes, tile, segments, layout, softmax_scale, backend):
    problem = Problem.of(q, k, tile, segments, layout, softmax_scale)
    q_shape, kv_shape = (
        (problem.batch, side.heads, side.num_blocks, problem.head_dim) for side in (problem.queries, problem.keys)
    )
    return (
        q.new_empty(q_shape, dtype=torch.float32),
        k.new_empty(kv_shape, dtype=torch.float32),
        q.new_empty(0) if v is None else q.new_empty(kv_shape, dtype=torch.float32),
    )


@Operator
def block_mean_backward(
    dmean: Tensor,
    x: Tensor,
    sizes: Tensor | None,
    tile: Sequence[int],
    segments: Sequence[int] | None,
    layout: str,
    softmax_scale: float,
    backend: str,
) -> Tensor:
    """Gradient of the block means of ``x`` in ``x``: each valid token's share of its block's, 0 for the others."""
    problem = Problem.of(x, x, tile, segments, layout, softmax_scale)
    run = backend_for("block_mean_backward", problem, backend, x)
    return run.block_mean_backward(problem.queries, dmean, x, sizes)


@block_mean_backward.fake
def _(dmean, x, sizes, tile, segments, layout, softmax_scale, backend):
    return empty_like(x)


def _setup_block_means(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    q, k, v, q_sizes, kv_sizes, *ctx.static = inputs
    save_tensors(ctx, q, k, v, q_sizes, kv_sizes)


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
    tangents = (tangent_or_zeros(x_t, x) for x_t, x in ((q_t, q), (k_t, k), (v_t, v)))
    return block_means(*tangents, q_sizes, kv_sizes, *ctx.static)


block_means.differentiate(_setup_block_means, _block_means_grad, _block_means_jvp)
block_mean_backward.differentiate_once()
