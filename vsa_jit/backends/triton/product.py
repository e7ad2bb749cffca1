"""Products: of matrices, and those that add up over the tiles of a row."""

import triton
import triton.language as tl


@triton.jit
def add_product(acc, a, b, EXACT: tl.constexpr):
    """acc + a · b, in fp32. ``EXACT`` adds up each tile's product by itself first: one sum over thousands of keys, term
    after term, would round more than PyTorch's blocked sums do, which matters for fp32 inputs alone."""
    if EXACT:
        # A multiply-add, because the compiler would turn a product plus acc back into a product that starts from acc.
        return tl.fma(tl.dot(a, b, input_precision="ieee"), 1.0, acc)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def matmul_kernel(
    A,
    B,
    Out,
    Tiles,
    num_tiles,
    m_len,
    n_len,
    k_len,
    stride_ar,
    stride_am,
    stride_ak,
    stride_br,
    stride_bk,
    stride_bn,
    OVER_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Out = A · B for each row r: [R, M, K] and [R, K, N] of any strides, fp32, Out contiguous.

    Each factor is a sum of two TF32 numbers, which hold 22 of its 24 bits, and three of their four products are added:
    faster than fp32's own units, and measured to be closer to fp64, since tensor cores add fewer partial sums in turn.

    ``Tiles`` is None where all of Out is computed, else the table of ``blocks.product_tiles``: either the columns or
    the sum (OVER_BLOCKS) are then the blocks of the sample that the rows of a tile belong to.
    """
    pid = tl.program_id(0)
    if Tiles is not None:
        r = (pid // num_tiles).to(tl.int64)
        Tiles += pid % num_tiles * 4
        m0, n0, begin, end = tl.load(Tiles), tl.load(Tiles + 1), tl.load(Tiles + 2), tl.load(Tiles + 3)
    else:
        tiles_m, tiles_n = tl.cdiv(m_len, BLOCK_M), tl.cdiv(n_len, BLOCK_N)
        r = (pid // (tiles_m * tiles_n)).to(tl.int64)
        m0, n0 = pid // tiles_n % tiles_m * BLOCK_M, pid % tiles_n * BLOCK_N
    m = (m0 + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (n0 + tl.arange(0, BLOCK_N)).to(tl.int64)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    in_m, in_n = m < m_len, n < n_len
    if Tiles is not None:
        in_m = m < end
        if OVER_BLOCKS:
            k_len = end - begin
            A += begin.to(tl.int64) * stride_ak
            B += begin.to(tl.int64) * stride_bk
        else:
            in_n = n < end
    a_ptrs = A + r * stride_ar + m[:, None] * stride_am + k[None, :] * stride_ak
    b_ptrs = B + r * stride_br + k[:, None] * stride_bk + n[None, :] * stride_bn
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, k_len, BLOCK_K):
        in_k = k < k_len - k0
        a = tl.load(a_ptrs, mask=in_m[:, None] & in_k[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=in_k[:, None] & in_n[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="tf32x3")
        a_ptrs += BLOCK_K * stride_ak
        b_ptrs += BLOCK_K * stride_bk
    out_ptrs = Out + (r * m_len + m[:, None]) * n_len + n[None, :]
    tl.store(out_ptrs, acc, mask=in_m[:, None] & in_n[None, :])
