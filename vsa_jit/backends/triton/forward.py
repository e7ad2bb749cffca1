"""Forward of the fine branch: each tile of query rows attends the key blocks of its block, online softmax, combine."""

import triton
import triton.language as tl

from vsa_jit.backends.triton.product import add_product
from vsa_jit.backends.triton.rows import (
    block_origin,
    frame_size,
    is_partial,
    load_gate,
    load_rows,
    relative_tokens,
    row_token,
    tiles_are_shifted,
    token_at,
    valid_rows,
)
from vsa_jit.backends.triton.runs import named_block, num_named


@triton.jit
def attend_forward_kernel(
    Q,
    K,
    V,
    Out,
    OutS,
    Lse,
    Q2kIdx,
    Q2kNum,
    QSizes,
    KSizes,
    Blocks,
    Gate,
    OutC,
    gate_value,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_ob,
    stride_oh,
    stride_os,
    stride_gb,
    stride_gh,
    stride_gs,
    stride_gd,
    heads,
    num_q_blocks,
    num_kv_blocks,
    width,
    q_len,
    kv_len,
    T,
    H,
    W,
    tiles_hw,
    tiles_w,
    inverse_hw,
    inverse_w,
    scale,
    scale_log2,
    GROUP: tl.constexpr,
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
    COMBINE: tl.constexpr,
    HAS_GATE: tl.constexpr,
    KEEP_OUT_S: tl.constexpr,
    ALIKE: tl.constexpr,
    OFFSET: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    TILES_M: tl.constexpr = BLOCK // BLOCK_M
    TILES_N: tl.constexpr = BLOCK // BLOCK_N
    MASK_D: tl.constexpr = D != D_PAD
    SEGMENTS: tl.constexpr = Blocks is not None
    SHIFTED: tl.constexpr = tiles_are_shifted(BLOCK_N, RASTER, SEGMENTS, TILE_H, TILE_W)

    pid = tl.program_id(0)
    tile = pid % (num_q_blocks * TILES_M)
    bh = pid // (num_q_blocks * TILES_M)
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    q_block = tile // TILES_M
    q_row0 = tile % TILES_M * BLOCK_M

    d = tl.arange(0, D_PAD)
    in_head = d < D
    q_w = W if RASTER else q_len
    kv_w = W if RASTER else kv_len
    q_origin = block_origin(
        q_block, RASTER, BLOCK, TILE_T, TILE_H, TILE_W, tiles_hw, tiles_w, inverse_hw, inverse_w, Blocks
    )
    q_height, q_width = frame_size(q_block, H, W, Blocks)
    q_token = token_at(q_origin, q_height, q_width)
    q_token += relative_tokens(q_row0, BLOCK_M, RASTER, TILE_H, TILE_W, q_height, q_width)
    q_valid = valid_rows(
        q_block, q_origin, q_row0, BLOCK_M, RASTER, TILE_H, TILE_W, T, H, q_w, QSizes, HAS_Q_SIZES, Blocks
    )
    q_ptrs = Q + b * stride_qb + h * stride_qh + q_token[:, None] * stride_qs + d[None, :]
    q = load_rows(q_ptrs, q_valid, in_head, MASK_Q, MASK_D)

    # With one row stride for both, one set of offsets is kept in registers.
    if ALIKE:
        stride_vs = stride_ks
    # Where offsets inside a block are the same for every block, only its first token moves from step to step.
    kv_row = relative_tokens(0, BLOCK_N, RASTER, TILE_H, TILE_W, H, W).to(OFFSET)
    k_tile = kv_row[:, None] * stride_ks + d[None, :]
    v_tile = kv_row[:, None] * stride_vs + d[None, :]
    K += b * stride_kb + h // GROUP * stride_kh
    V += b * stride_vb + h // GROUP * stride_vh
    row = bh.to(tl.int64) * num_q_blocks + q_block
    Q2kIdx += row * width
    num, is_run = num_named(tl.load(Q2kNum + row), width, num_kv_blocks, SEGMENTS)

    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    out_of_range = 0
    for step in range(0, num * TILES_N):
        named = named_block(Q2kIdx, step // TILES_N, is_run, SEGMENTS)
        kv_block = tl.minimum(tl.maximum(named, 0), num_kv_blocks - 1)
        out_of_range |= named ^ kv_block
        kv_row0 = step % TILES_N * BLOCK_N
        kv_origin = block_origin(
            kv_block, RASTER, BLOCK, TILE_T, TILE_H, TILE_W, tiles_hw, tiles_w, inverse_hw, inverse_w, Blocks
        )
        kv_height, kv_width = frame_size(kv_block, H, W, Blocks)
        kv_token = token_at(kv_origin, kv_height, kv_width)
        if not SHIFTED:
            kv_row = relative_tokens(kv_row0, BLOCK_N, RASTER, TILE_H, TILE_W, kv_height, kv_width).to(OFFSET)
            k_tile = kv_row[:, None] * stride_ks + d[None, :]
            v_tile = kv_row[:, None] * stride_vs + d[None, :]
        elif TILES_N > 1:
            kv_token += row_token(kv_row0, RASTER, TILE_H, TILE_W, kv_height, kv_width)
        k_ptrs = K + kv_token * stride_ks + k_tile
        v_ptrs = V + kv_token * stride_vs + v_tile
        kv_valid = valid_rows(
            kv_block, kv_origin, kv_row0, BLOCK_N, RASTER, TILE_H, TILE_W, T, H, kv_w, KSizes, HAS_K_SIZES, Blocks
        )
        k = load_rows(k_ptrs, kv_valid, in_head, MASK_K, MASK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASK_K:
            # The branch spares full blocks the masking.
            if is_partial(
                kv_block, kv_origin, RASTER, BLOCK, TILE_T, TILE_H, TILE_W, T, H, kv_w, KSizes, HAS_K_SIZES, Blocks
            ):
                s = tl.where(kv_valid[None, :], s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1))
        if MASK_K:
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        else:
            shift = new_max
        if EXACT:
            p = tl.math.exp2((s - shift[:, None]) * scale_log2)
        else:
            p = tl.math.exp2(s * scale_log2 - (shift * scale_log2)[:, None])
        alpha = tl.math.exp2((row_max - shift) * scale_log2)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        v = load_rows(v_ptrs, kv_valid, in_head, MASK_K, MASK_D)
        acc = add_product(acc, p.to(v.dtype), v, EXACT)
        row_max = new_max

    out = acc * tl.where(row_sum > 0.0, 1.0 / row_sum, 0.0)[:, None]
    lse = tl.where(row_sum > 0.0, row_max * scale + tl.log(row_sum), float("-inf"))
    # A row with NaN in its sum keeps it, and a map that names a block that does not exist is answered loudly.
    poisoned = (row_sum != row_sum) | (out_of_range != 0)
    out = tl.where(poisoned[:, None], float("nan"), out)
    lse = tl.where(poisoned, float("nan"), lse)

    out_offset = b * stride_ob + h * stride_oh + q_token[:, None] * stride_os + d[None, :]
    if RASTER:
        stored = q_valid
    else:
        stored = q_token < q_len
    if MASK_Q:
        out = tl.where(q_valid[:, None], out, 0.0)
        lse = tl.where(q_valid, lse, float("-inf"))
    tl.store(Lse + bh.to(tl.int64) * q_len + q_token, lse, mask=stored)
    if KEEP_OUT_S:
        tl.store(OutS + out_offset, out.to(OutS.dtype.element_ty), mask=stored[:, None] & in_head[None, :])
    if COMBINE:
        out_c = tl.load(OutC + row * D + d, mask=in_head, other=0.0).to(tl.float32)
        if HAS_GATE:
            mask = q_valid[:, None] & in_head[None, :]
            gate = load_gate(Gate, b, h, q_token, d, mask, stride_gb, stride_gh, stride_gs, stride_gd)
            out += gate * out_c[None, :]
        else:
            out += tl.where(q_valid, gate_value, 0.0)[:, None] * out_c[None, :]
    tl.store(Out + out_offset, out.to(Out.dtype.element_ty), mask=stored[:, None] & in_head[None, :])
