"""Means over the valid tokens of each block, and their gradient."""

import triton
import triton.language as tl

from vsa_jit.backends.triton.rows import block_origin, frame_size, relative_tokens, token_at, valid_rows


@triton.jit
def block_weight(
    block,
    origin,
    BLOCK: tl.constexpr,
    RASTER: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    T,
    H,
    W,
    Sizes,
    HAS_SIZES: tl.constexpr,
    Blocks,
    MASK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One over the number of valid tokens of a block; 1 for an empty one."""
    weight = 1.0 / BLOCK
    if MASK:
        count = 0
        for row0 in tl.static_range(0, BLOCK, ROWS):
            valid = valid_rows(block, origin, row0, ROWS, RASTER, TILE_H, TILE_W, T, H, W, Sizes, HAS_SIZES, Blocks)
            count += tl.sum(valid.to(tl.int32), 0)
        weight = 1.0 / tl.maximum(count, 1).to(tl.float32)
    return weight


@triton.jit
def token_share(
    DMean,
    index,
    block,
    origin,
    d,
    in_head,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    RASTER: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    T,
    H,
    W,
    Sizes,
    HAS_SIZES: tl.constexpr,
    Blocks,
    MASK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """What each valid token of a block gets of the gradient of its mean, ``DMean[index]``: fp32 [D_PAD]."""
    weight = block_weight(block, origin, BLOCK, RASTER, TILE_H, TILE_W, T, H, W, Sizes, HAS_SIZES, Blocks, MASK, ROWS)
    return tl.load(DMean + index * D + d, mask=in_head, other=0.0) * weight


@triton.jit
def write_block_mean(
    X,
    Mean,
    Sizes,
    Blocks,
    index,
    stride_b,
    stride_h,
    stride_s,
    heads,
    num_blocks,
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
):
    """Mean[index] = Σ valid X / count, where ``index`` counts (batch, head, block)."""
    block = index % num_blocks
    bh = index // num_blocks
    X += (bh // heads).to(tl.int64) * stride_b + (bh % heads).to(tl.int64) * stride_h
    d = tl.arange(0, D_PAD)
    in_head = d < D
    origin = block_origin(
        block, RASTER, BLOCK, TILE_T, TILE_H, TILE_W, tiles_hw, tiles_w, inverse_hw, inverse_w, Blocks
    )
    weight = block_weight(block, origin, BLOCK, RASTER, TILE_H, TILE_W, T, H, W, Sizes, HAS_SIZES, Blocks, MASK, ROWS)
    height, width = frame_size(block, H, W, Blocks)
    total = tl.zeros([D_PAD], tl.float32)
    for row0 in tl.static_range(0, BLOCK, ROWS):
        token = token_at(origin, height, width) + relative_tokens(row0, ROWS, RASTER, TILE_H, TILE_W, height, width)
        x_ptrs = X + token[:, None] * stride_s + d[None, :]
        if MASK:
            valid = valid_rows(block, origin, row0, ROWS, RASTER, TILE_H, TILE_W, T, H, W, Sizes, HAS_SIZES, Blocks)
            x = tl.load(x_ptrs, mask=valid[:, None] & in_head[None, :], other=0.0)
        else:
            x = tl.load(x_ptrs, mask=in_head[None, :], other=0.0)
        total += tl.sum(x.to(tl.float32), 0)
    tl.store(Mean + index.to(tl.int64) * D + d, total * weight, mask=in_head)


@triton.jit
def block_means_kernel(
    Q,
    K,
    V,
    QMean,
    KMean,
    VMean,
    QSizes,
    KSizes,
    Blocks,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    heads,
    kv_heads,
    num_q_blocks,
    num_kv_blocks,
    q_programs,
    kv_programs,
    q_len,
    kv_len,
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
    HAS_Q_SIZES: tl.constexpr,
    HAS_K_SIZES: tl.constexpr,
    MASK_Q: tl.constexpr,
    MASK_K: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Means of q, k and, where there are programs for it, v: one launch, a program for each block of each."""
    q_w = W if RASTER else q_len
    kv_w = W if RASTER else kv_len
    pid = tl.program_id(0)
    if pid < q_programs:
        write_block_mean(
            Q, QMean, QSizes, Blocks, pid, stride_qb, stride_qh, stride_qs, heads, num_q_blocks, T, H, q_w,
            tiles_hw, tiles_w, inverse_hw, inverse_w, D, D_PAD, BLOCK, TILE_T, TILE_H, TILE_W, RASTER,
            HAS_Q_SIZES, MASK_Q, ROWS,
        )  # fmt: skip
    elif pid < q_programs + kv_programs:
        write_block_mean(
            K, KMean, KSizes, Blocks, pid - q_programs, stride_kb, stride_kh, stride_ks, kv_heads, num_kv_blocks, T, H,
            kv_w, tiles_hw, tiles_w, inverse_hw, inverse_w, D, D_PAD, BLOCK, TILE_T, TILE_H, TILE_W, RASTER,
            HAS_K_SIZES, MASK_K, ROWS,
        )  # fmt: skip
    elif V is not None:
        write_block_mean(
            V, VMean, KSizes, Blocks, pid - q_programs - kv_programs, stride_vb, stride_vh, stride_vs, kv_heads,
            num_kv_blocks, T, H, kv_w, tiles_hw, tiles_w, inverse_hw, inverse_w, D, D_PAD, BLOCK,
            TILE_T, TILE_H, TILE_W, RASTER, HAS_K_SIZES, MASK_K, ROWS,
        )  # fmt: skip


@triton.jit
def block_mean_backward_kernel(
    DMean,
    DX,
    Sizes,
    Blocks,
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
):
    """DX[token] = DMean[b, h, block] / count for the valid tokens of each block, 0 for the others."""
    block = tl.program_id(0) % num_blocks
    bh = tl.program_id(0) // num_blocks
    DX += (bh // heads).to(tl.int64) * stride_b + (bh % heads).to(tl.int64) * stride_h
    d = tl.arange(0, D_PAD)
    in_head = d < D
    w = W if RASTER else length
    origin = block_origin(
        block, RASTER, BLOCK, TILE_T, TILE_H, TILE_W, tiles_hw, tiles_w, inverse_hw, inverse_w, Blocks
    )
    index = bh.to(tl.int64) * num_blocks + block
    share = token_share(
        DMean, index, block, origin, d, in_head, D, BLOCK, RASTER, TILE_H, TILE_W, T, H, w, Sizes, HAS_SIZES, Blocks,
        MASK, ROWS,
    )  # fmt: skip
    height, width = frame_size(block, H, W, Blocks)
    for row0 in tl.static_range(0, BLOCK, ROWS):
        token = token_at(origin, height, width) + relative_tokens(row0, ROWS, RASTER, TILE_H, TILE_W, height, width)
        valid = valid_rows(block, origin, row0, ROWS, RASTER, TILE_H, TILE_W, T, H, w, Sizes, HAS_SIZES, Blocks)
        if RASTER:
            stored = valid
        else:
            stored = token < length
        rows = tl.where(valid[:, None], share[None, :], 0.0).to(DX.dtype.element_ty)
        dx_ptrs = DX + token[:, None] * stride_s + d[None, :]
        tl.store(dx_ptrs, rows, mask=stored[:, None] & in_head[None, :])
