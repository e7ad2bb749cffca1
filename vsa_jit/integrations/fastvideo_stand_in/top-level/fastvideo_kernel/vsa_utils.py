"""How a video is cut into tiles, for callers of ``video_sparse_attn`` that pad and reorder by themselves."""

import math
from typing import Any

import torch
from torch import Tensor

VSA_TILE_SIZE = (4, 4, 4)


def get_tile_partition_indices(
    dit_seq_shape: tuple[int, int, int], tile_size: tuple[int, int, int], device: torch.device | str
) -> Tensor:
    """Raster positions, int64 [T·H·W], of the tokens in tiled order."""
    return _tile_of_tokens(dit_seq_shape, tile_size, device).argsort(stable=True)


def get_reverse_tile_partition_indices(
    dit_seq_shape: tuple[int, int, int], tile_size: tuple[int, int, int], device: torch.device | str
) -> Tensor:
    """Tiled positions, int64 [T·H·W], of the tokens in raster order."""
    return get_tile_partition_indices(dit_seq_shape, tile_size, device).argsort()


def construct_variable_block_sizes(
    dit_seq_shape: tuple[int, int, int],
    num_tiles: tuple[int, int, int],
    device: torch.device | str,
    tile_size: tuple[int, int, int] = VSA_TILE_SIZE,
) -> Tensor:
    """Tokens of each tile, int32 [number of tiles]."""
    tile = _tile_of_tokens(dit_seq_shape, tile_size, device)
    return tile.bincount(minlength=math.prod(num_tiles)).int()


def get_non_pad_index(variable_block_sizes: Tensor, max_block_size: int) -> Tensor:
    """Positions of the tokens, int64 [number of tokens], in a sequence whose blocks are padded to full size."""
    slot = torch.arange(max_block_size, device=variable_block_sizes.device)
    return (slot < variable_block_sizes[:, None]).flatten().nonzero().flatten()


def build_vsa_metadata(
    dit_seq_shape: tuple[int, int, int],
    tile_size: tuple[int, int, int] = VSA_TILE_SIZE,
    device: torch.device | str = "cuda",
) -> dict[str, Any]:
    """All of these for a video of (T, H, W) tokens, by their names, with ``num_tiles`` and ``max_block_size``.

    Raises:
        ValueError: a tile has another number of tokens than 64, 128 or 256.
    """
    block = math.prod(tile_size)
    if block not in (64, 128, 256):
        raise ValueError(f"tile_size: expected a tile of 64, 128 or 256 tokens, got {tile_size} with {block}")
    t, h, w = (-(-extent // side) for extent, side in zip(dit_seq_shape, tile_size, strict=True))
    sizes = construct_variable_block_sizes(dit_seq_shape, (t, h, w), device, tile_size)
    return {
        "tile_partition_indices": get_tile_partition_indices(dit_seq_shape, tile_size, device),
        "reverse_tile_partition_indices": get_reverse_tile_partition_indices(dit_seq_shape, tile_size, device),
        "variable_block_sizes": sizes,
        "non_pad_index": get_non_pad_index(sizes, block),
        "num_tiles": (t, h, w),
        "max_block_size": block,
    }


def _tile_of_tokens(shape: tuple[int, int, int], tile_size: tuple[int, int, int], device: torch.device | str) -> Tensor:
    """The number of the tile of each token, in raster order."""
    t, h, w = (torch.arange(extent, device=device) // side for extent, side in zip(shape, tile_size, strict=True))
    tiles_h, tiles_w = (-(-extent // side) for extent, side in zip(shape[1:], tile_size[1:], strict=True))
    return ((t[:, None, None] * tiles_h + h[:, None]) * tiles_w + w).flatten()
