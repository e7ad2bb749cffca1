"""Tiles of a video and the tokens of each block, for every order that tokens come in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vsa_jit.problem import Side


def tile_tokens(grid: Sequence[int], tile: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """Raster token of each slot of each tile of a video: int64 [n, t·h·w], -1 where a border tile has no token.

    Args:
        grid: frames, height and width of the video in tokens ``(T, H, W)``; w runs fastest in the sequence.
        tile: the block as ``(t, h, w)``. Tiles are numbered like tokens, w fastest, and so are the slots of a tile.
    """
    positions = []
    for extent, side in zip(grid, tile, strict=True):
        position = torch.arange(-(-extent // side) * side, device=device).view(-1, side)
        positions.append(torch.where(position < extent, position, -1))
    t = positions[0][:, None, None, :, None, None]
    h = positions[1][None, :, None, None, :, None]
    w = positions[2][None, None, :, None, None, :]
    tokens = (t * grid[1] + h) * grid[2] + w
    tokens = torch.where((t >= 0) & (h >= 0) & (w >= 0), tokens, -1)
    return tokens.reshape(-1, tile[0] * tile[1] * tile[2])


def block_tokens(side: Side, sizes: Tensor | None, device: torch.device) -> Tensor:
    """Token of each slot of each block: int64 [n, block], -1 where the slot holds no valid token."""
    if side.grid is not None:
        return tile_tokens(side.grid, side.tile, device)
    if side.segments is not None:
        blocks = []
        for segment in side.segments.segments:
            of_segment = (
                _run_tokens(segment.length, side.block, device)
                if segment.grid is None
                else tile_tokens(segment.grid, side.tile, device)
            )
            blocks.append(torch.where(of_segment >= 0, of_segment + segment.first_token, -1))
        return torch.cat(blocks)
    if sizes is None:
        return _run_tokens(side.length, side.block, device)
    tokens = torch.arange(side.num_blocks * side.block, device=device).view(-1, side.block)
    return torch.where(torch.arange(side.block, device=device) < sizes[:, None], tokens, -1)


def _run_tokens(length: int, block: int, device: torch.device) -> Tensor:
    """The same of consecutive tokens."""
    tokens = torch.arange(-(-length // block) * block, device=device).view(-1, block)
    return torch.where(tokens < length, tokens, -1)
