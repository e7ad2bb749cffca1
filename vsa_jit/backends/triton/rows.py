"""Where the rows of a block lie in memory, for every order of tokens, as code that all kernels share."""

import triton
import triton.language as tl


@triton.constexpr_function
def tiles_are_shifted(rows, raster, tile_h, tile_w):
    """Whether any run of ``rows`` rows of a block is a shifted copy of the first, so that its offsets can be reused."""
    plane = tile_h * tile_w
    return not raster or (rows % tile_w == 0 and (rows % plane == 0 or plane % rows == 0))


@triton.jit
def row_token(row, RASTER: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, H, W):
    """Token number of a row (or rows) of any block, counted from the block's first token: int64, of the rows' shape."""
    if RASTER:
        t = row // (TILE_H * TILE_W)
        h = row // TILE_W % TILE_H
        token = (t.to(tl.int64) * H + h) * W + row % TILE_W
    else:
        token = row.to(tl.int64)
    return token


@triton.jit
def relative_tokens(row0, ROWS: tl.constexpr, RASTER: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, H, W):
    """``row_token`` of the rows ``row0 .. row0 + ROWS``: int64 [ROWS]."""
    return row_token(row0 + tl.arange(0, ROWS), RASTER, TILE_H, TILE_W, H, W)


@triton.jit
def first_token(
    block,
    RASTER: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    H,
    W,
):
    """Token number of row 0 of a block: int64 scalar."""
    if RASTER:
        tiles_h = tl.cdiv(H, TILE_H)
        tiles_w = tl.cdiv(W, TILE_W)
        t0 = block // (tiles_h * tiles_w) * TILE_T
        h0 = block // tiles_w % tiles_h * TILE_H
        w0 = block % tiles_w * TILE_W
        token = (t0.to(tl.int64) * H + h0) * W + w0
    else:
        token = block.to(tl.int64) * BLOCK
    return token


@triton.jit
def valid_rows(
    block,
    row0,
    ROWS: tl.constexpr,
    RASTER: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    T,
    H,
    W,
    S,
    Sizes,
    HAS_SIZES: tl.constexpr,
):
    """Which of the rows ``row0 .. row0 + ROWS`` of a block hold a valid token: bool [ROWS]."""
    row = row0 + tl.arange(0, ROWS)
    if RASTER:
        tiles_h = tl.cdiv(H, TILE_H)
        tiles_w = tl.cdiv(W, TILE_W)
        t = block // (tiles_h * tiles_w) * TILE_T + row // (TILE_H * TILE_W)
        h = block // tiles_w % tiles_h * TILE_H + row // TILE_W % TILE_H
        w = block % tiles_w * TILE_W + row % TILE_W
        valid = (t < T) & (h < H) & (w < W)
    elif HAS_SIZES:
        valid = row < tl.load(Sizes + block)
    else:
        valid = row < S - block.to(tl.int64) * BLOCK
    return valid
