"""Backward of the fine branch: one preparation, one pass over key blocks for dq, one over query blocks for dk and dv.

Two passes recompute the scores twice, and in exchange nothing is accumulated with atomics: gradients are the same bits
on every run.
"""

import math

import triton
import triton.language as tl

from vsa_jit.backends.triton.means import token_share
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
from vsa_jit.backends.triton.runs import load_range, named_block, num_named

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def probabilities(s, shift, scale, scale_log2, EXACT: tl.constexpr):
    """exp(s · scale − lse). ``shift`` is lse in base 2, so that one multiply-add is left; for fp32, where its rounding
    would be the largest error, it is lse itself."""
    if EXACT:
        return tl.math.exp2((s * scale - shift) * LOG2E)
    return tl.math.exp2(s * scale_log2 - shift)


@triton.jit
def prepare_backward_kernel(
    DOut,
    OutS,
    Lse,
    DLse,
    QSizes,
    Blocks,
    Gate,
    OutC,
    DGate,
    DOutC,
    Shift,
    Delta,
    gate_value,
    stride_dob,
    stride_doh,
    stride_dos,
    stride_osb,
    stride_osh,
    stride_oss,
    stride_gb,
    stride_gh,
    stride_gs,
    stride_gd,
    stride_dgb,
    stride_dgh,
    stride_dgs,
    heads,
    num_q_blocks,
    q_len,
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
    HAS_DLSE: tl.constexpr,
    COMBINE: tl.constexpr,
    HAS_GATE: tl.constexpr,
    IS_COMBINED: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Per query block: delta = Σ_d dout · out_s − dlse, the shift for ``probabilities``, the gradients of the combine.

    ``Shift`` and ``Delta`` are in block order, padded to whole blocks, so that the two passes read them without masks;
    a row that attends nothing gets the shift +inf, which makes its probabilities 0.
    """
    q_block = tl.program_id(0) % num_q_blocks
    bh = tl.program_id(0) // num_q_blocks
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    row = bh.to(tl.int64) * num_q_blocks + q_block
    d = tl.arange(0, D_PAD)
    in_head = d < D
    if COMBINE:
        out_c = tl.load(OutC + row * D + d, mask=in_head, other=0.0).to(tl.float32)
        dout_c = tl.zeros([D_PAD], tl.float32)
    q_w = W if RASTER else q_len
    origin = block_origin(
        q_block, RASTER, BLOCK, TILE_T, TILE_H, TILE_W, tiles_hw, tiles_w, inverse_hw, inverse_w, Blocks
    )
    height, width = frame_size(q_block, H, W, Blocks)
    for row0 in range(0, BLOCK, BLOCK_M):
        token = token_at(origin, height, width) + relative_tokens(row0, BLOCK_M, RASTER, TILE_H, TILE_W, height, width)
        valid = valid_rows(
            q_block, origin, row0, BLOCK_M, RASTER, TILE_H, TILE_W, T, H, q_w, QSizes, HAS_Q_SIZES, Blocks
        )
        mask = valid[:, None] & in_head[None, :]
        dout_ptrs = DOut + b * stride_dob + h * stride_doh + token[:, None] * stride_dos + d[None, :]
        dout = tl.load(dout_ptrs, mask=mask, other=0.0).to(tl.float32)
        out_ptrs = OutS + b * stride_osb + h * stride_osh + token[:, None] * stride_oss + d[None, :]
        out_s = tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32)
        if IS_COMBINED:
            out_s -= gate_value * out_c[None, :]
        lse = tl.load(Lse + bh.to(tl.int64) * q_len + token, mask=valid, other=float("-inf"))
        delta = tl.sum(dout * out_s, 1)
        if HAS_DLSE:
            delta -= tl.load(DLse + bh.to(tl.int64) * q_len + token, mask=valid, other=0.0)
        padded = row * BLOCK + row0 + tl.arange(0, BLOCK_M)
        shift = lse if EXACT else lse * LOG2E
        tl.store(Shift + padded, tl.where(lse == float("-inf"), float("inf"), shift))
        tl.store(Delta + padded, delta)
        if COMBINE:
            if HAS_GATE:
                gate = load_gate(Gate, b, h, token, d, mask, stride_gb, stride_gh, stride_gs, stride_gd)
                dout_c += tl.sum(gate * dout, 0)
                dgate_ptrs = DGate + b * stride_dgb + h * stride_dgh + token[:, None] * stride_dgs + d[None, :]
                if RASTER:
                    stored = valid
                else:
                    stored = token < q_len
                dgate = (dout * out_c[None, :]).to(DGate.dtype.element_ty)
                tl.store(dgate_ptrs, dgate, mask=stored[:, None] & in_head[None, :])
            else:
                dout_c += gate_value * tl.sum(dout, 0)
    if COMBINE:
        tl.store(DOutC + row * D + d, dout_c.to(DOutC.dtype.element_ty), mask=in_head)


@triton.jit
def attend_backward_q_kernel(
    Q,
    K,
    V,
    DOut,
    DQ,
    DQMean,
    Shift,
    Delta,
    Q2kIdx,
    Q2kNum,
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
    stride_dob,
    stride_doh,
    stride_dos,
    stride_dqb,
    stride_dqh,
    stride_dqs,
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
    ALIKE: tl.constexpr,
    OFFSET: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq of one tile of query rows: Σ over its key blocks of ds · k, with ds = p · (dout · vᵀ − delta).

    The shares of the tokens in the gradient of their block's mean are added, where there is one.
    """
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
    row = bh.to(tl.int64) * num_q_blocks + q_block

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
    dout_ptrs = DOut + b * stride_dob + h * stride_doh + q_token[:, None] * stride_dos + d[None, :]
    q = load_rows(q_ptrs, q_valid, in_head, MASK_Q, MASK_D)
    dout = load_rows(dout_ptrs, q_valid, in_head, MASK_Q, MASK_D)
    padded = row * BLOCK + q_row0 + tl.arange(0, BLOCK_M)
    shift = tl.load(Shift + padded)
    delta = tl.load(Delta + padded)

    # With one row stride for both, one set of offsets is kept in registers.
    if ALIKE:
        stride_vs = stride_ks
    kv_row = relative_tokens(0, BLOCK_N, RASTER, TILE_H, TILE_W, H, W).to(OFFSET)
    k_tile = kv_row[:, None] * stride_ks + d[None, :]
    v_tile = kv_row[:, None] * stride_vs + d[None, :]
    K += b * stride_kb + h // GROUP * stride_kh
    V += b * stride_vb + h // GROUP * stride_vh
    Q2kIdx += row * width
    num, is_run = num_named(tl.load(Q2kNum + row), width, num_kv_blocks, SEGMENTS)

    dq = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    for step in range(0, num * TILES_N):
        kv_block = named_block(Q2kIdx, step // TILES_N, is_run, SEGMENTS)
        kv_block = tl.minimum(tl.maximum(kv_block, 0), num_kv_blocks - 1)
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
        v = load_rows(v_ptrs, kv_valid, in_head, MASK_K, MASK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        p = probabilities(s, shift[:, None], scale, scale_log2, EXACT)
        ds = p * (dp - delta[:, None])
        if MASK_K:
            # The branch spares full blocks the masking.
            if is_partial(
                kv_block, kv_origin, RASTER, BLOCK, TILE_T, TILE_H, TILE_W, T, H, kv_w, KSizes, HAS_K_SIZES, Blocks
            ):
                ds = tl.where(kv_valid[None, :], ds, 0.0)
        dq = add_product(dq, ds.to(k.dtype), k, EXACT)

    dq *= scale
    if DQMean is not None:
        share = token_share(
            DQMean, row, q_block, q_origin, d, in_head, D, BLOCK, RASTER, TILE_H, TILE_W, T, H, q_w, QSizes,
            HAS_Q_SIZES, Blocks, MASK_Q, BLOCK_M,
        )  # fmt: skip
        dq += share[None, :]
    if RASTER:
        stored = q_valid
    else:
        stored = q_token < q_len
    if MASK_Q:
        dq = tl.where(q_valid[:, None], dq, 0.0)
    dq_ptrs = DQ + b * stride_dqb + h * stride_dqh + q_token[:, None] * stride_dqs + d[None, :]
    tl.store(dq_ptrs, dq.to(DQ.dtype.element_ty), mask=stored[:, None] & in_head[None, :])


@triton.jit
def attend_backward_kv_kernel(
    Q,
    K,
    V,
    DOut,
    DK,
    DV,
    DKMean,
    DVMean,
    Shift,
    Delta,
    K2qEnd,
    K2qIdx,
    Ranges,
    NumRanges,
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
    stride_dob,
    stride_doh,
    stride_dos,
    stride_dkb,
    stride_dkh,
    stride_dks,
    stride_dvb,
    stride_dvh,
    stride_dvs,
    kv_heads,
    num_q_blocks,
    num_kv_blocks,
    chunks,
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
    ALIKE: tl.constexpr,
    OFFSET: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk and dv of one tile of key rows: Σ over the query blocks that selected it, of every query head of its group.

    Scores are computed transposed, keys by queries, so that pᵀ and dsᵀ stay in registers as left operands. Shares in
    the gradients of block means are added as to dq.
    """
    TILES_M: tl.constexpr = BLOCK // BLOCK_M
    TILES_N: tl.constexpr = BLOCK // BLOCK_N
    MASK_D: tl.constexpr = D != D_PAD
    SEGMENTS: tl.constexpr = Blocks is not None
    SHIFTED: tl.constexpr = tiles_are_shifted(BLOCK_M, RASTER, SEGMENTS, TILE_H, TILE_W)

    pid = tl.program_id(0)
    tile = pid % (num_kv_blocks * TILES_N)
    b_kv = pid // (num_kv_blocks * TILES_N)
    b = (b_kv // kv_heads).to(tl.int64)
    h_kv = (b_kv % kv_heads).to(tl.int64)
    kv_block = tile // TILES_N
    kv_row0 = tile % TILES_N * BLOCK_N

    d = tl.arange(0, D_PAD)
    in_head = d < D
    q_w = W if RASTER else q_len
    kv_w = W if RASTER else kv_len
    kv_origin = block_origin(
        kv_block, RASTER, BLOCK, TILE_T, TILE_H, TILE_W, tiles_hw, tiles_w, inverse_hw, inverse_w, Blocks
    )
    kv_height, kv_width = frame_size(kv_block, H, W, Blocks)
    kv_token = token_at(kv_origin, kv_height, kv_width)
    kv_token += relative_tokens(kv_row0, BLOCK_N, RASTER, TILE_H, TILE_W, kv_height, kv_width)
    kv_valid = valid_rows(
        kv_block, kv_origin, kv_row0, BLOCK_N, RASTER, TILE_H, TILE_W, T, H, kv_w, KSizes, HAS_K_SIZES, Blocks
    )
    k_ptrs = K + b * stride_kb + h_kv * stride_kh + kv_token[:, None] * stride_ks + d[None, :]
    v_ptrs = V + b * stride_vb + h_kv * stride_vh + kv_token[:, None] * stride_vs + d[None, :]
    k = load_rows(k_ptrs, kv_valid, in_head, MASK_K, MASK_D)
    v = load_rows(v_ptrs, kv_valid, in_head, MASK_K, MASK_D)

    # With one row stride for both, one set of offsets is kept in registers.
    if ALIKE:
        stride_dos = stride_qs
    q_row = relative_tokens(0, BLOCK_M, RASTER, TILE_H, TILE_W, H, W).to(OFFSET)
    q_tile = q_row[:, None] * stride_qs + d[None, :]
    dout_tile = q_row[:, None] * stride_dos + d[None, :]

    dk = tl.zeros([BLOCK_N, D_PAD], tl.float32)
    dv = tl.zeros([BLOCK_N, D_PAD], tl.float32)
    for g in range(0, GROUP):
        h = h_kv * GROUP + g
        bh = b_kv.to(tl.int64) * GROUP + g
        Q_h = Q + b * stride_qb + h * stride_qh
        DOut_h = DOut + b * stride_dob + h * stride_doh
        entry = (bh * num_kv_blocks + kv_block) * chunks
        begin = tl.load(K2qEnd + entry - 1, mask=entry > 0, other=0)
        count = (tl.load(K2qEnd + entry + chunks - 1) - begin).to(tl.int32)
        # The list of query blocks that name the key block, and ranges of those that name a run with it in it.
        num_lists = 1
        if SEGMENTS:
            num_lists += tl.load(NumRanges + bh)
        for index in range(0, num_lists):
            first, num = 0, count
            if SEGMENTS:
                first, num = load_range(Ranges + bh * num_q_blocks * 4, index - 1, kv_block)
                num = tl.where(index == 0, count, num)
            for step in range(0, num * TILES_M):
                if SEGMENTS:
                    of_range = first + step // TILES_M
                    q_block = tl.load(K2qIdx + begin + step // TILES_M, mask=index == 0, other=of_range)
                else:
                    q_block = tl.load(K2qIdx + begin + step // TILES_M)
                q_row0 = step % TILES_M * BLOCK_M
                q_origin = block_origin(
                    q_block, RASTER, BLOCK, TILE_T, TILE_H, TILE_W, tiles_hw, tiles_w, inverse_hw, inverse_w, Blocks
                )
                q_height, q_width = frame_size(q_block, H, W, Blocks)
                q_token = token_at(q_origin, q_height, q_width)
                if not SHIFTED:
                    q_row = relative_tokens(q_row0, BLOCK_M, RASTER, TILE_H, TILE_W, q_height, q_width).to(OFFSET)
                    q_tile = q_row[:, None] * stride_qs + d[None, :]
                    dout_tile = q_row[:, None] * stride_dos + d[None, :]
                elif TILES_M > 1:
                    q_token += row_token(q_row0, RASTER, TILE_H, TILE_W, q_height, q_width)
                q_ptrs = Q_h + q_token * stride_qs + q_tile
                dout_ptrs = DOut_h + q_token * stride_dos + dout_tile
                q_valid = valid_rows(
                    q_block, q_origin, q_row0, BLOCK_M, RASTER, TILE_H, TILE_W, T, H, q_w, QSizes, HAS_Q_SIZES, Blocks
                )
                q = load_rows(q_ptrs, q_valid, in_head, MASK_Q, MASK_D)
                dout = load_rows(dout_ptrs, q_valid, in_head, MASK_Q, MASK_D)
                padded = (bh * num_q_blocks + q_block) * BLOCK + q_row0 + tl.arange(0, BLOCK_M)
                shift = tl.load(Shift + padded)
                delta = tl.load(Delta + padded)
                s_t = tl.dot(k, tl.trans(q), input_precision="ieee")
                p_t = probabilities(s_t, shift[None, :], scale, scale_log2, EXACT)
                dv = add_product(dv, p_t.to(dout.dtype), dout, EXACT)
                dp_t = tl.dot(v, tl.trans(dout), input_precision="ieee")
                ds_t = p_t * (dp_t - delta[None, :])
                dk = add_product(dk, ds_t.to(q.dtype), q, EXACT)

    dk *= scale
    kv_index = b_kv.to(tl.int64) * num_kv_blocks + kv_block
    if DKMean is not None:
        share = token_share(
            DKMean, kv_index, kv_block, kv_origin, d, in_head, D, BLOCK, RASTER, TILE_H, TILE_W, T, H, kv_w, KSizes,
            HAS_K_SIZES, Blocks, MASK_K, BLOCK_N,
        )  # fmt: skip
        dk += share[None, :]
    if DVMean is not None:
        share = token_share(
            DVMean, kv_index, kv_block, kv_origin, d, in_head, D, BLOCK, RASTER, TILE_H, TILE_W, T, H, kv_w, KSizes,
            HAS_K_SIZES, Blocks, MASK_K, BLOCK_N,
        )  # fmt: skip
        dv += share[None, :]
    if RASTER:
        stored = kv_valid
    else:
        stored = kv_token < kv_len
    if MASK_K:
        dk = tl.where(kv_valid[:, None], dk, 0.0)
        dv = tl.where(kv_valid[:, None], dv, 0.0)
    mask = stored[:, None] & in_head[None, :]
    dk_ptrs = DK + b * stride_dkb + h_kv * stride_dkh + kv_token[:, None] * stride_dks + d[None, :]
    dv_ptrs = DV + b * stride_dvb + h_kv * stride_dvh + kv_token[:, None] * stride_dvs + d[None, :]
    tl.store(dk_ptrs, dk.to(DK.dtype.element_ty), mask=mask)
    tl.store(dv_ptrs, dv.to(DV.dtype.element_ty), mask=mask)
