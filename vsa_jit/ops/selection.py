"""Which key blocks each query block attends: by scores of blocks, or by a map. These operators see no tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vsa_jit import flops
from vsa_jit.backends.choose import selection_backend_for
from vsa_jit.backends.coarse import select
from vsa_jit.operators import Operator
from vsa_jit.problem import Coarse, contiguous_like
from vsa_jit.segments import Segments, listed_width, order_of


def _segments_of(tile: Sequence[int], numbers: Sequence[int] | None) -> Segments | None:
    return order_of(numbers, (tile[0], tile[1], tile[2])).segments


@Operator
def coarse_attend_tangent(
    q_c: Tensor,
    k_c: Tensor,
    v_c: Tensor,
    q_c_t: Tensor,
    k_c_t: Tensor,
    v_c_t: Tensor,
    kv_sizes: Tensor | None,
    selection_dtype: torch.dtype,
    tile: Sequence[int],
    segments: Sequence[int] | None,
    softmax_scale: float,
    backend: str,
) -> Tensor:
    """The tangent of the coarse output along those of the block means q_c, k_c and v_c."""
    coarse = Coarse(_segments_of(tile, segments), softmax_scale, selection_dtype)
    run = selection_backend_for("coarse_attend_tangent", backend, q_c.device)
    return run.coarse_attend_tangent(coarse, q_c, k_c, v_c, q_c_t, k_c_t, v_c_t, kv_sizes)


@coarse_attend_tangent.fake
def _(q_c, *_):
    return contiguous_like(q_c)


coarse_attend_tangent.differentiate_once()

coarse_attend_tangent.count_flops(flops.coarse_attend_tangent)


@Operator
def select_blocks(
    scores: Tensor,
    kv_sizes: Tensor | None,
    topk: Sequence[int],
    compete: bool,
    tile: Sequence[int],
    segments: Sequence[int] | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The selection of ``video_sparse_attn`` by given scores [B, H, n_q, n_k], where every block that a query block
    attends is named: ``(q2k_idx, q2k_num)``, int32 [B, H, n_q, m] and [B, H, n_q]."""
    run, of_blocks = selection_backend_for("select", backend, scores.device), _segments_of(tile, segments)
    topk = [min(count, scores.shape[3]) for count in topk]
    rows = scores.float().contiguous().flatten(0, 1)
    idx, num = select(run, of_blocks, rows, kv_sizes, topk, compete)
    if of_blocks is not None:
        entry = torch.arange(listed_width(of_blocks, topk), device=scores.device, dtype=torch.int32)
        listed = torch.nn.functional.pad(idx, (0, len(entry) - idx.shape[-1]))
        is_run = num[..., None] < 0
        idx = torch.where(is_run, torch.where(entry < -num[..., None], idx[..., :1] + entry, 0), listed)
        num = num.abs()
    return idx.unflatten(0, scores.shape[:2]), num.unflatten(0, scores.shape[:2])


@select_blocks.fake
def _(scores, kv_sizes, topk, compete, tile, segments, backend):
    order = _segments_of(tile, segments)
    width = topk[0] if order is None else listed_width(order, topk)
    return (
        scores.new_empty((*scores.shape[:3], width), dtype=torch.int32),
        scores.new_empty(scores.shape[:3], dtype=torch.int32),
    )


@Operator
def map_to_indices(block_map: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """The set columns of each row of a bool map [B, H, n_q, n_k] as ``(q2k_idx, q2k_num)``: int32 [B, H, n_q, n_k],
    ascending, 0 past the number set; int32 [B, H, n_q]."""
    run = selection_backend_for("map_to_indices", backend, block_map.device)
    return run.map_to_indices(block_map)


@map_to_indices.fake
def _(block_map, backend):
    return (
        block_map.new_empty(block_map.shape, dtype=torch.int32),
        block_map.new_empty(block_map.shape[:3], dtype=torch.int32),
    )
