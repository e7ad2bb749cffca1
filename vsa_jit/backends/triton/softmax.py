"""Softmax of the coarse branch and its gradient: one program has a whole row of scores."""

import triton
import triton.language as tl


@triton.jit
def sample_of_row(Rows, num_kv_blocks):
    """The first column and the end of the sample of this program's row, by the table of ``segments.selection_rows``."""
    Row = Rows + tl.program_id(0) % num_kv_blocks * 4
    return tl.load(Row), tl.load(Row + 1)


@triton.jit
def scale_narrow(product, scale, DTYPE: tl.constexpr):
    """Scales products in a dtype narrower than fp32, in which each step is rounded; in fp32 they stay as they are."""
    if tl.float32 != DTYPE:
        product = (product.to(DTYPE).to(tl.float32) * scale).to(DTYPE).to(tl.float32)
    return product


@triton.jit
def load_scores(Scores, Sizes, column, first, end, all_empty, scale, HAS_SIZES: tl.constexpr, DTYPE: tl.constexpr):
    """Some scores of a row, -inf for what takes no part: empty blocks, unless all are, and those outside the sample."""
    own = (column >= first) & (column < end)
    score = scale_narrow(tl.load(Scores + column, mask=own, other=float("-inf")), scale, DTYPE)
    if HAS_SIZES:
        empty = tl.load(Sizes + column, mask=own, other=1) < 1
        score = tl.where(empty & ~all_empty, float("-inf"), score)
    return score


@triton.jit
def softmax_of_row(
    Scores,
    Sizes,
    Rows,
    num_kv_blocks,
    scale,
    scale_log2,
    COLUMNS: tl.constexpr,
    HAS_SIZES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Replaces the products of this program's row by their probabilities, rounded to a dtype.

    ``scale_log2`` is log2(e) times what ``scale_narrow`` leaves to scale. The row is read in parts, again for each
    step: it comes from a cache, and beside what ``select_kernel`` keeps it would not fit the registers.
    """
    PART: tl.constexpr = COLUMNS // 4 if COLUMNS > 256 else COLUMNS
    entry = tl.arange(0, PART)
    Scores += tl.program_id(0).to(tl.int64) * num_kv_blocks
    first, end = 0, num_kv_blocks
    if Rows is not None:
        first, end = sample_of_row(Rows, num_kv_blocks)
    all_empty = False
    if HAS_SIZES:
        # Where all blocks are empty, all hold a mean of 0: attending those gives the 0 that is wanted.
        nonempty = tl.zeros([PART], tl.int32)
        for start in range(0, num_kv_blocks, PART):
            column = start + entry
            nonempty += (tl.load(Sizes + column, mask=column < num_kv_blocks, other=0) > 0).to(tl.int32)
        all_empty = tl.sum(nonempty, 0) == 0

    highest = tl.full([PART], float("-inf"), tl.float32)
    for start in range(0, num_kv_blocks, PART):
        score = load_scores(Scores, Sizes, start + entry, first, end, all_empty, scale, HAS_SIZES, DTYPE)
        highest = tl.maximum(highest, score)
    shift = tl.max(highest, 0)
    total = tl.zeros([PART], tl.float32)
    for start in range(0, num_kv_blocks, PART):
        score = load_scores(Scores, Sizes, start + entry, first, end, all_empty, scale, HAS_SIZES, DTYPE)
        total += tl.exp2((score - shift) * scale_log2)
    weight = 1.0 / tl.sum(total, 0)
    for start in range(0, num_kv_blocks, PART):
        column = start + entry
        score = load_scores(Scores, Sizes, column, first, end, all_empty, scale, HAS_SIZES, DTYPE)
        p = (tl.exp2((score - shift) * scale_log2) * weight).to(DTYPE).to(tl.float32)
        tl.store(Scores + column, p, mask=column < num_kv_blocks)


@triton.jit
def softmax_kernel(
    Scores,
    Sizes,
    Rows,
    num_kv_blocks,
    scale,
    scale_log2,
    COLUMNS: tl.constexpr,
    HAS_SIZES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    softmax_of_row(Scores, Sizes, Rows, num_kv_blocks, scale, scale_log2, COLUMNS, HAS_SIZES, DTYPE)


@triton.jit
def softmax_backward_kernel(Probs, DProbs, Rows, num_kv_blocks, scale, COLUMNS: tl.constexpr):
    column = tl.arange(0, COLUMNS)
    own = column < num_kv_blocks
    if Rows is not None:
        first, end = sample_of_row(Rows, num_kv_blocks)
        own = (column >= first) & (column < end)
    offset = tl.program_id(0).to(tl.int64) * num_kv_blocks + column
    p = tl.load(Probs + offset, mask=own, other=0.0)
    dp = tl.load(DProbs + offset, mask=own, other=0.0)
    tl.store(DProbs + offset, p * (dp - tl.sum(p * dp, 0)) * scale, mask=own)
