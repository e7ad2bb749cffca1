"""The steps of ``video_sparse_attn`` by themselves, for who selects key blocks by rules of their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vsa_jit.backends.choose import NAMES
from vsa_jit.checks import (
    check_choice,
    check_context,
    check_map,
    check_problem,
    check_scores,
    check_topk_of_samples,
)
from vsa_jit.ops import pooling, selection
from vsa_jit.problem import BackendName, Context, Layout, SegmentList, axes


def block_means(
    x: Tensor,
    variable_block_sizes: Tensor | None = None,
    *,
    block_size: int | Sequence[int] = 64,
    grid: Sequence[int] | None = None,
    segments: SegmentList | None = None,
    layout: Layout = "bhsd",
    backend: BackendName = "auto",
) -> Tensor:
    """The mean of each block's valid tokens, which the selection of ``video_sparse_attn`` scores; differentiable.

    Scores of a selection with other rules begin like this::

        q_c, k_c = (vsa_jit.block_means(x, grid=grid, layout="bshd") for x in (q, k))
        scores = q_c @ k_c.mT

    Args:
        x: [B, H, S, D] (or [B, S, H, D], see ``layout``): q, k or v.

    The other arguments are those of ``video_sparse_attn``.

    Returns:
        fp32 [B, H, n, D], 0 for a block without valid tokens.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it (x as q), what was expected and what came.
        RuntimeError: the backend asked for cannot run this call.
    """
    check_choice("backend", backend, NAMES)
    problem = check_problem(
        x,
        x,
        x,
        block_size=block_size,
        grid=grid,
        segments=segments,
        layout=layout,
        softmax_scale=None,
        variable_block_sizes=variable_block_sizes,
        q_variable_block_sizes=None,
    )
    sizes = None if variable_block_sizes is None else variable_block_sizes.contiguous()
    # The operator takes keys, too: those of one head cost little.
    one_head = x.detach().narrow(axes(layout)[1], 0, 1)
    means, _, _ = pooling.block_means(x, one_head, None, sizes, sizes, *problem.static, backend)
    return means


@torch.no_grad()
def select_blocks(
    scores: Tensor,
    topk: int | Sequence[int] | None = None,
    variable_block_sizes: Tensor | None = None,
    *,
    sparsity: float | Sequence[float] | None = None,
    block_size: int | Sequence[int] = 64,
    segments: SegmentList | None = None,
    context: Context = "attend",
    backend: BackendName = "auto",
) -> tuple[Tensor, Tensor]:
    """The key blocks of highest score of each query block, as ``video_sparse_attn`` selects them.

    A bonus for neighbours, say, or a random choice is a matter of the scores::

        scores = scores + bonus
        q2k_idx, q2k_num = vsa_jit.select_blocks(scores, topk=64)
        out, lse = vsa_jit.block_sparse_attn_from_indices(q, k, v, q2k_idx, q2k_num, grid=grid, layout="bshd")

    Args:
        scores: [B, H, n_q, n_k], of any floating dtype, compared in fp32. Ties go to the lower block.
        variable_block_sizes: int32 or int64 [n_k]: a block without valid tokens is not selected.
        block_size, segments, context: as in ``video_sparse_attn``. With ``segments`` n_q = n_k is the number of their
            blocks, scores of blocks of different samples are ignored, ``topk`` and ``sparsity`` count blocks of video,
            context is selected beside them or competes with them, and a query block of context gets its whole sample.

    The other arguments are those of ``video_sparse_attn``.

    Returns:
        ``(q2k_idx, q2k_num)``: int32 [B, H, n_q, m], the selected blocks, ascending, 0 past their number; int32
        [B, H, n_q], their number. m is the most that a query block can have.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what was expected and what came.
        RuntimeError: the backend asked for cannot run on the device.
    """
    check_choice("backend", backend, NAMES)
    tile, keys = check_scores(scores, variable_block_sizes, block_size=block_size, segments=segments)
    of_samples = check_topk_of_samples(topk, sparsity, segments, keys)
    compete = check_context(context, segments)
    sizes = None if variable_block_sizes is None else variable_block_sizes.contiguous()
    numbers = None if keys.segments is None else list(keys.segments.numbers)
    return selection.select_blocks(scores, sizes, of_samples, compete, list(tile), numbers, backend)


@torch.no_grad()
def map_to_indices(block_map: Tensor, backend: BackendName = "auto") -> tuple[Tensor, Tensor]:
    """The set columns of each row of a map of blocks, as ``block_sparse_attn_from_indices`` takes them.

    A map that many calls share is turned into indices once::

        near = (frame[:, None] - frame).abs() <= 1  # blocks of neighbouring frames
        q2k_idx, q2k_num = vsa_jit.map_to_indices(near.expand(B, H, n, n))

    Args:
        block_map: bool [B, H, n_q, n_k], of any strides.

    Returns:
        ``(q2k_idx, q2k_num)``: int32 [B, H, n_q, n_k], ascending, 0 past the number set; int32 [B, H, n_q].

    Raises:
        TypeError, ValueError: the map has another dtype or shape; the message says what was expected and what came.
        RuntimeError: the backend asked for cannot run on the device.
    """
    check_choice("backend", backend, NAMES)
    check_map(block_map)
    return selection.map_to_indices(block_map, backend)
