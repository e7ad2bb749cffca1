"""Maps of blocks as indices."""

import torch
from torch import Tensor


def map_to_index(block_map: Tensor) -> tuple[Tensor, Tensor]:
    """The set columns of each row of a map.

    Args:
        block_map: [B, H, n_q, n_k], or [H, n_q, n_k] for one sample; of any dtype, set where it is not 0.

    Returns:
        ``(index, number)``: int32 [B, H, n_q, n_k], ascending, -1 past the number set; int32 [B, H, n_q].
    """
    if block_map.dim() not in (3, 4):
        raise ValueError(f"block_map: expected 3 or 4 dimensions, got shape {tuple(block_map.shape)}")
    is_set = block_map.bool()[(None,) * (4 - block_map.dim())]
    number = is_set.sum(-1, dtype=torch.int32)
    column = is_set.sort(dim=-1, descending=True, stable=True).indices
    counts = torch.arange(is_set.shape[-1], device=is_set.device) < number[..., None]
    return torch.where(counts, column, -1).int(), number
