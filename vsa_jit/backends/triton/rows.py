"""Where the rows of a block lie in memory, for every order of tokens, as code that all kernels share.

A block is a tile (t, h, w) of a video in raster order, or (RASTER false) a run of a sequence, whose only coordinate is
w. ``T, H, W`` is the extent of the video; of a sequence, W is its length. Divisions by the number of tiles would be the
longest chain of instructions in the inner loop: ``inverse_hw`` and ``inverse_w`` are the reciprocals of ``tiles_hw``
and ``tiles_w``, see ``reciprocal``.

Blocks of segments are tiles in raster order, too, each of a video of its own: ``Blocks``, which is None for the other
orders, points to the table of ``blocks.block_table``.
"""

import triton
import triton.language as tl

SHIFT = tl.constexpr(40)
# What ``blocks.block_table`` says of each block of segments, by column, and the number of columns.
FIRST_TOKEN, HEIGHT, WIDTH = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
T_LEFT, H_LEFT, W_LEFT = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)
ROWS_LEFT, NUM_TOKENS, COLUMNS = tl.constexpr(6), tl.constexpr(7), tl.constexpr(8)


def reciprocal(divisor: int) -> int:
    """What ``divide`` multiplies by: exact for dividends below 2^40 / divisor (Granlund and Montgomery, PLDI 1994)."""
    return -(-(1 << SHIFT.value) // divisor)


@triton.jit
def divide(x, inverse):
    return ((x.to(tl.int64) * inverse) >> SHIFT).to(tl.int32)


@triton.jit
def of_block(Blocks, block, COLUMN: tl.constexpr):
    return tl.load(Blocks + block * COLUMNS + COLUMN)


@triton.constexpr_function
def tiles_are_shifted(rows, raster, segments, tile_h, tile_w):
    """Whether any run of ``rows`` rows of any block is a shifted copy of the first, so that its offsets can be reused.

    Those of segments are not: each block may be of a video of another width.
    """
    plane = tile_h * tile_w
    return not raster or (not segments and rows % tile_w == 0 and (rows % plane == 0 or plane % rows == 0))


@triton.jit
def block_origin(
    block,
    RASTER: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    tiles_hw,
    tiles_w,
    inverse_hw,
    inverse_w,
    Blocks,
):
    """Coordinates (t, h, w) of a block's first token: int64 scalars; of segments (0, 0, token)."""
    if Blocks is not None:
        zero = tl.full([], 0, tl.int64)
        origin = (zero, zero, of_block(Blocks, block, FIRST_TOKEN).to(tl.int64))
    elif RASTER:
        t = divide(block, inverse_hw)
        h = divide(block - t * tiles_hw, inverse_w)
        w = block - t * tiles_hw - h * tiles_w
        origin = (t.to(tl.int64) * TILE_T, h.to(tl.int64) * TILE_H, w.to(tl.int64) * TILE_W)
    else:
        zero = tl.full([], 0, tl.int64)
        origin = (zero, zero, block.to(tl.int64) * BLOCK)
    return origin


@triton.jit
def frame_size(block, H, W, Blocks):
    """Height and width of the video that a block is of."""
    if Blocks is not None:
        H = of_block(Blocks, block, HEIGHT)
        W = of_block(Blocks, block, WIDTH)
    return H, W


@triton.jit
def token_at(origin, H, W):
    """Token number of a block's first token: int64 scalar."""
    return (origin[0] * H + origin[1]) * W + origin[2]


@triton.jit
def row_token(row, RASTER: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, H, W):
    """Token number of a row (or rows) of a block, counted from the block's first token: int64, of the rows' shape.

    ``H`` and ``W`` are those of ``frame_size``.
    """
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
def is_partial(
    block,
    origin,
    RASTER: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    T,
    H,
    W,
    Sizes,
    HAS_SIZES: tl.constexpr,
    Blocks,
):
    """Whether some row of a block holds no valid token."""
    if Blocks is not None:
        partial = of_block(Blocks, block, NUM_TOKENS) < BLOCK
    elif RASTER:
        partial = (origin[0] + TILE_T > T) | (origin[1] + TILE_H > H) | (origin[2] + TILE_W > W)
    elif HAS_SIZES:
        partial = tl.load(Sizes + block) < BLOCK
    else:
        partial = origin[2] + BLOCK > W
    return partial


@triton.jit
def valid_rows(
    block,
    origin,
    row0,
    ROWS: tl.constexpr,
    RASTER: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    T,
    H,
    W,
    Sizes,
    HAS_SIZES: tl.constexpr,
    Blocks,
):
    """Which of the rows ``row0 .. row0 + ROWS`` of a block hold a valid token: bool [ROWS]."""
    row = row0 + tl.arange(0, ROWS)
    if RASTER:
        if Blocks is not None:
            t_left = of_block(Blocks, block, T_LEFT)
            h_left = of_block(Blocks, block, H_LEFT)
            w_left = of_block(Blocks, block, W_LEFT)
        else:
            # An extent of a video fits 32 bits, and comparing in 64 costs registers.
            t_left = (T - origin[0]).to(tl.int32)
            h_left = (H - origin[1]).to(tl.int32)
            w_left = (W - origin[2]).to(tl.int32)
        valid = (row // (TILE_H * TILE_W) < t_left) & (row // TILE_W % TILE_H < h_left) & (row % TILE_W < w_left)
        if Blocks is not None:
            valid = valid & (row < of_block(Blocks, block, ROWS_LEFT))
    elif HAS_SIZES:
        valid = row < tl.load(Sizes + block)
    else:
        valid = row < W - origin[2]
    return valid


@triton.jit
def load_rows(ptrs, valid, in_head, MASK: tl.constexpr, MASK_D: tl.constexpr):
    """Rows of a tile, 0 where they are not valid (MASK) and past the head's width (MASK_D)."""
    if MASK:
        rows = tl.load(ptrs, mask=valid[:, None] & in_head[None, :], other=0.0)
    elif MASK_D:
        rows = tl.load(ptrs, mask=in_head[None, :], other=0.0)
    else:
        rows = tl.load(ptrs)
    return rows


@triton.jit
def load_gate(Gate, b, h, token, d, mask, stride_gb, stride_gh, stride_gs, stride_gd):
    """The coarse branch's weight of some tokens, fp32 [tokens, D_PAD], 0 outside the mask. Its strides may be 0."""
    ptrs = Gate + b * stride_gb + h * stride_gh + token[:, None] * stride_gs + d[None, :].to(tl.int64) * stride_gd
    return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
