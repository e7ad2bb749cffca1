"""Rows of a selection that name a run: consecutive key blocks, of which only the first is an entry. Only rows of
segments may, with less than 0 for a number."""

import triton
import triton.language as tl


@triton.jit
def num_named(num, width, num_kv_blocks, SEGMENTS: tl.constexpr):
    """How many key blocks a row names, and whether they are a run, from its number."""
    count = tl.minimum(tl.maximum(num, 0), width)
    is_run = False
    if SEGMENTS:
        is_run = num < 0
        # A run that reaches past the last block poisons its row, and one block too many is enough for that.
        length = -tl.maximum(num, -num_kv_blocks - 1)
        count = tl.where(is_run, tl.where(width > 0, length, 0), count)
    return count, is_run


@triton.jit
def named_block(Q2kIdx, entry, is_run, SEGMENTS: tl.constexpr):
    """The key block that an entry of a row names."""
    if SEGMENTS:
        block = tl.load(Q2kIdx + tl.where(is_run, 0, entry)) + tl.where(is_run, entry, 0)
    else:
        block = tl.load(Q2kIdx + entry)
    return block


@triton.jit
def load_run(Q2kIdx, Q2kNum, q_block, num_q_blocks, width):
    """The run that each of some query blocks of a head names: its first key block, and its length or 0."""
    exists = (q_block >= 0) & (q_block < num_q_blocks)
    num = tl.load(Q2kNum + q_block, mask=exists, other=0)
    first = tl.load(Q2kIdx + q_block.to(tl.int64) * width, mask=num < 0, other=0)
    return first.to(tl.int64), tl.maximum(-num.to(tl.int64), 0)


@triton.jit
def find_runs_kernel(Q2kIdx, Q2kNum, Ranges, NumRanges, num_q_blocks, num_kv_blocks, width, ROWS: tl.constexpr):
    """Ranges of query blocks that name the same run, of one head.

    The queries of a segment of context all name the same, so that a head has few ranges, and a key block finds the
    query blocks whose runs it is in without a list of its own. ``Ranges`` is [B·H, n_q, 4]: the first query block and
    the end of each range, the first key block and the end of the run; ``NumRanges`` [B·H] counts them.
    """
    bh = tl.program_id(0).to(tl.int64)
    Q2kIdx += bh * num_q_blocks * width
    Q2kNum += bh * num_q_blocks
    Ranges += bh * num_q_blocks * 4
    num_ranges = 0
    for row0 in range(0, num_q_blocks, ROWS):
        q_block = row0 + tl.arange(0, ROWS)
        first, length = load_run(Q2kIdx, Q2kNum, q_block, num_q_blocks, width)
        first_before, length_before = load_run(Q2kIdx, Q2kNum, q_block - 1, num_q_blocks, width)
        first_after, length_after = load_run(Q2kIdx, Q2kNum, q_block + 1, num_q_blocks, width)
        begins = (length > 0) & ((first != first_before) | (length != length_before))
        ends = (length > 0) & ((first != first_after) | (length != length_after))
        # A range that began earlier has its number from there.
        number = num_ranges + tl.cumsum(begins.to(tl.int32), 0) - 1
        ptrs = Ranges + number.to(tl.int64) * 4
        tl.store(ptrs, q_block, mask=begins)
        tl.store(ptrs + 1, q_block + 1, mask=ends)
        tl.store(ptrs + 2, tl.minimum(tl.maximum(first, 0), num_kv_blocks).to(tl.int32), mask=begins)
        tl.store(ptrs + 3, tl.minimum(tl.maximum(first + length, 0), num_kv_blocks).to(tl.int32), mask=begins)
        num_ranges += tl.sum(begins.to(tl.int32), 0)
    tl.store(NumRanges + bh, num_ranges)


@triton.jit
def load_range(Ranges, index, kv_block):
    """The first query block of a range, and how many there are if their run has the key block in it, else 0. Of index
    -1, which is no range, both are 0."""
    exists = index >= 0
    ptrs = Ranges + index * 4
    first = tl.load(ptrs, mask=exists, other=0)
    end = tl.load(ptrs + 1, mask=exists, other=0)
    is_in_run = (kv_block >= tl.load(ptrs + 2, mask=exists, other=0)) & (
        kv_block < tl.load(ptrs + 3, mask=exists, other=0)
    )
    return first, tl.where(is_in_run, end - first, 0)
