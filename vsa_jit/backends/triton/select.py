"""Which key blocks each query block attends: top-k of scores with their softmax, the indices of a map, and indices
transposed."""

import triton
import triton.language as tl

from vsa_jit.backends.triton.softmax import sample_of_row, scale_narrow, softmax_of_row


@triton.jit
def store_selected(selected, column, Q2kIdx, Q2kNum, row, width, WIDTH_PAD: tl.constexpr):
    """Writes the selected columns of one row in ascending order, 0 in the unused entries, and their number."""
    position = tl.cumsum(selected.to(tl.int32), 0) - 1
    num = tl.sum(selected.to(tl.int32), 0)
    out = Q2kIdx + row * width
    tl.store(out + position, column, mask=selected)
    entry = tl.arange(0, WIDTH_PAD)
    tl.store(out + entry, tl.zeros([WIDTH_PAD], tl.int32), mask=(entry >= num) & (entry < width))
    tl.store(Q2kNum + row, num)


@triton.jit
def select_kernel(
    Scores,
    Sizes,
    Rows,
    Q2kIdx,
    Q2kNum,
    num_kv_blocks,
    topk,
    scale,
    scale_log2,
    COLUMNS: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
    HAS_SIZES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Top-k of one row, ties to the lower column, and the probabilities of the row, which replace its scores.

    A threshold that exactly topk scores reach is sought bit by bit, from the highest down; where none exists, because
    several scores equal the k-th largest, all bits are found and the ties are counted off.

    ``Rows`` is None where all columns are alike, else the table of ``segments.selection_rows``. Room is then for topk
    columns of a row, of which the table may want fewer; a row that attends all of its sample names the first column
    alone.

    ``DTYPE`` is None where the scores stay as they are, else that of ``softmax_of_row``.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    eligible = column < num_kv_blocks
    wanted = topk
    if Rows is not None:
        first, end = sample_of_row(Rows, num_kv_blocks)
        num = tl.load(Rows + tl.program_id(0) % num_kv_blocks * 4 + 2)
        # Where all blocks of the sample are attended there is nothing to choose from.
        end = tl.where(num < 0, first, end)
        eligible = (column >= first) & (column < end)
        wanted = tl.minimum(tl.maximum(num, 0), topk)
    if HAS_SIZES:
        eligible = eligible & (tl.load(Sizes + column, mask=eligible, other=0) > 0)
    score = tl.load(Scores + row * num_kv_blocks + column, mask=eligible, other=0.0)
    if DTYPE is not None:
        score = scale_narrow(score, scale, DTYPE)
    # Unsigned keys in the order of the floats; -0 counts as +0, and 0 is left to the columns that take no part.
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)
    key = tl.maximum(key, 1)
    if Rows is not None:
        # The highest key is left to the columns that every row takes.
        is_forced = tl.load(Rows + column * 4 + 3, mask=eligible, other=0) != 0
        key = tl.where(is_forced, 0xFFFFFFFF, tl.minimum(key, 0xFFFFFFFE))
    key = tl.where(eligible, key, 0)

    one = tl.full([], 1, tl.uint32)
    threshold = tl.full([], 0, tl.uint32)
    count = tl.sum(eligible.to(tl.int32), 0)
    wanted = tl.minimum(count, wanted)
    bit = 31
    while (bit >= 0) & (count != wanted):
        candidate = threshold | (one << bit)
        reach = tl.sum((key >= candidate).to(tl.int32), 0)
        threshold = tl.where(reach >= wanted, candidate, threshold)
        count = tl.where(reach >= wanted, reach, count)
        bit -= 1
    selected = eligible & (key >= threshold)
    if count != wanted:
        above = eligible & (key > threshold)
        equal = eligible & (key == threshold)
        rank = tl.cumsum(equal.to(tl.int32), 0)
        selected = above | (equal & (rank <= wanted - tl.sum(above.to(tl.int32), 0)))
    store_selected(selected, column, Q2kIdx, Q2kNum, row, topk, WIDTH_PAD)
    if Rows is not None:
        if num < 0:
            # Threads that wrote 0 may be others than the one that writes now.
            tl.debug_barrier()
            tl.store(Q2kIdx + row * topk, first)
            tl.store(Q2kNum + row, num)
    if DTYPE is not None:
        softmax_of_row(Scores, Sizes, Rows, num_kv_blocks, scale, scale_log2, COLUMNS, HAS_SIZES, DTYPE)


@triton.jit
def map_to_indices_kernel(BlockMap, Q2kIdx, Q2kNum, num_kv_blocks, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    in_map = column < num_kv_blocks
    selected = tl.load(BlockMap + row * num_kv_blocks + column, mask=in_map, other=0) != 0
    store_selected(selected & in_map, column, Q2kIdx, Q2kNum, row, num_kv_blocks, COLUMNS)


@triton.jit
def transpose_index_kernel(
    Q2kIdx,
    Q2kNum,
    Counts,
    K2qIdx,
    num_q_blocks,
    num_kv_blocks,
    width,
    chunks,
    rows_per_chunk,
    WIDTH_PAD: tl.constexpr,
    PLACE: tl.constexpr,
):
    """One of the two passes of a counting sort of all (key block, query block) pairs by key block.

    ``Counts`` is [B·H, n_k, chunks], a chunk being a run of query blocks. The first pass counts the pairs of each cell;
    the second, given where each cell's pairs begin, puts every query block in its place. A chunk's rows go in order,
    and the entries of one row that name the same key block are equal, so atomics decide nothing that can be seen.
    """
    bh = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    entry = tl.arange(0, WIDTH_PAD)
    for step in range(0, rows_per_chunk):
        q_block = chunk * rows_per_chunk + step
        if q_block < num_q_blocks:
            row = bh.to(tl.int64) * num_q_blocks + q_block
            used = entry < tl.minimum(tl.load(Q2kNum + row), width)
            kv_block = tl.load(Q2kIdx + row * width + entry, mask=used, other=-1)
            used = (kv_block >= 0) & (kv_block < num_kv_blocks)
            cell = Counts + (bh.to(tl.int64) * num_kv_blocks + kv_block) * chunks + chunk
            if PLACE:
                place = tl.atomic_add(cell, 1, mask=used, sem="relaxed")
                tl.store(K2qIdx + place, tl.zeros_like(kv_block) + q_block, mask=used)
                tl.debug_barrier()
            else:
                tl.atomic_add(cell, 1, mask=used, sem="relaxed")
