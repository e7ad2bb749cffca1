"""The blocks of segments as a table that the kernels read, and the tiles of products within samples."""

from __future__ import annotations

import torch
from torch import Tensor

from vsa_jit.backends.triton.rows import COLUMNS
from vsa_jit.segments import Segment, Segments
from vsa_jit.tables import on_device


def block_table(segments: Segments, device: torch.device) -> Tensor:
    """What the kernels know of each block: int32 [n, 8].

    A row holds the number of the block's first token; height and width of its video; how much of the tile there is
    along t, h and w; how many rows of it there are; and how many tokens that makes. Plain tokens are described as a
    video as wide and high as a tile, in which the rows of a tile are consecutive tokens: only their number ends it.
    """
    return on_device(("blocks", segments), device, lambda: _block_table(segments))


def _block_table(segments: Segments) -> Tensor:
    tables = [_plain_blocks if segment.grid is None else _video_blocks for segment in segments.segments]
    rows = [table(segment, segments.tile) for table, segment in zip(tables, segments.segments, strict=True)]
    return torch.cat(rows).int()


def _plain_blocks(segment: Segment, tile: tuple[int, int, int]) -> Tensor:
    t, h, w = tile
    table = torch.empty((segment.num_blocks, COLUMNS.value), dtype=torch.int64)
    start = torch.arange(segment.num_blocks) * (t * h * w)
    rows = (segment.length - start).clamp(max=t * h * w)
    table[:, 0] = segment.first_token + start
    table[:, 1:6] = torch.tensor([h, w, t, h, w])
    table[:, 6] = table[:, 7] = rows
    return table


def _video_blocks(segment: Segment, tile: tuple[int, int, int]) -> Tensor:
    assert segment.grid is not None
    _, height, width = segment.grid
    starts = [torch.arange(0, extent, side) for extent, side in zip(segment.grid, tile, strict=True)]
    t, h, w = torch.cartesian_prod(*starts).unbind(1)
    left = [(extent - start).clamp(max=side) for extent, start, side in zip(segment.grid, (t, h, w), tile, strict=True)]
    table = torch.empty((segment.num_blocks, COLUMNS.value), dtype=torch.int64)
    table[:, 0] = segment.first_token + (t * height + h) * width + w
    table[:, 1:3] = torch.tensor([height, width])
    table[:, 3:6] = torch.stack(left, 1)
    table[:, 6] = tile[0] * tile[1] * tile[2]
    table[:, 7] = left[0] * left[1] * left[2]
    return table


def product_tiles(segments: Segments, rows: int, columns: int, width: int | None, device: torch.device) -> Tensor:
    """The tiles of a product of which each sample has its own: int32 [tiles, 4].

    A tile is one of ``rows`` blocks of a sample by ``columns`` of that sample's blocks or, where the product is
    ``width`` wide and sums over blocks, of that width. It holds the first row, the first column, and the first block
    and the end of the sample.
    """
    key = "product tiles", segments, rows, columns, width
    return on_device(key, device, lambda: _product_tiles(segments, rows, columns, width))


def _product_tiles(segments: Segments, rows: int, columns: int, width: int | None) -> Tensor:
    tiles = []
    for sample in segments.samples:
        begin, end = sample.first_block, sample.first_block + sample.num_blocks
        first_rows = torch.arange(begin, end, rows)
        first_columns = torch.arange(begin, end, columns) if width is None else torch.arange(0, width, columns)
        corners = torch.cartesian_prod(first_rows, first_columns)
        tiles.append(torch.cat([corners, torch.tensor([[begin, end]]).expand(len(corners), -1)], 1))
    return torch.cat(tiles).int()
