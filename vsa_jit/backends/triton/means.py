"""Means over the valid tokens of each block, and their gradient."""

import triton
import triton.language as tl

from vsa_jit.backends.triton.rows import block_origin, relative_tokens, token_at, valid_rows


@triton.jit
def block_mean_kernel(
    X,
    Mean,
    Sizes,
    stride_b,
    stride_h,
    stride_s,
    heads,
    num_blocks,
    length,
    T,
    H,
    W,
    tiles_hw,
    tiles_w,
    inverse_hw,
    inverse_w,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    RASTER: tl.constexpr,
    HAS_SIZES: tl.constexpr,
    MASK: tl.constexpr,
    ROWS: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """Forward: Mean[b, h, block] = Σ valid X / count. Backward: X[token] = Mean[b, h, block] / count, else 0."""
    block = tl.program_id(0) % num_blocks
    bh = tl.program_id(0) // num_blocks
    X += (bh // heads).to(tl.int64) * stride_b + (bh % heads).to(tl.int64) * stride_h
    d = tl.arange(0, D_PAD)
    in_head = d < D
    mean_ptrs = Mean + (bh.to(tl.int64) * num_blocks + block) * D + d

    width = W if RASTER else length
    origin = block_origin(block, RASTER, BLOCK, TILE_T, TILE_H, TILE_W, tiles_hw, tiles_w, inverse_hw, inverse_w)
    if MASK:
        count = 0
        for row0 in tl.static_range(0, BLOCK, ROWS):
            valid = valid_rows(block, origin, row0, ROWS, RASTER, TILE_H, TILE_W, T, H, width, Sizes, HAS_SIZES)
            count += tl.sum(valid.to(tl.int32), 0)
        weight = 1.0 / tl.maximum(count, 1).to(tl.float32)
    else:
        weight = 1.0 / BLOCK

    if BACKWARD:
        share = tl.load(mean_ptrs, mask=in_head, other=0.0) * weight
    else:
        total = tl.zeros([D_PAD], tl.float32)
    for row0 in tl.static_range(0, BLOCK, ROWS):
        valid = valid_rows(block, origin, row0, ROWS, RASTER, TILE_H, TILE_W, T, H, width, Sizes, HAS_SIZES)
        token = token_at(origin, H, W) + relative_tokens(row0, ROWS, RASTER, TILE_H, TILE_W, H, W)
        x_ptrs = X + token[:, None] * stride_s + d[None, :]
        if BACKWARD:
            if RASTER:
                stored = valid
            else:
                stored = token < length
            rows = tl.where(valid[:, None], share[None, :], 0.0).to(X.dtype.element_ty)
            tl.store(x_ptrs, rows, mask=stored[:, None] & in_head[None, :])
        else:
            if MASK:
                x = tl.load(x_ptrs, mask=valid[:, None] & in_head[None, :], other=0.0)
            else:
                x = tl.load(x_ptrs, mask=in_head[None, :], other=0.0)
            total += tl.sum(x.to(tl.float32), 0)
    if not BACKWARD:
        tl.store(mean_ptrs, total * weight, mask=in_head)
