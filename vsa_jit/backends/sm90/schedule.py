"""The host's side of ``scheduler.cuh``: how the query boxes of a call are divided into work tiles."""

from __future__ import annotations

from typing import Any

import torch

from vsa_jit.backends.sm90.layout import divisor
from vsa_jit.backends.sm90.structs import BOX_TOKENS, IndexBits, structures
from vsa_jit.problem import Problem, Side

# Rows of a window: one lane of a warp ranks each of them.
WINDOW_ROWS = 32
# So that 32 bits count whatever there is of a sequence.
MAX_BLOCKS = 1 << 20


def why_too_many_blocks(problem: Problem) -> str | None:
    """Why a call has too many blocks. None: it has not."""
    if problem.queries.num_blocks > MAX_BLOCKS:
        return f"the kernels take at most {MAX_BLOCKS} query blocks, and there are {problem.queries.num_blocks}"
    most = MAX_BLOCKS // (problem.block // BOX_TOKENS)
    if problem.keys.num_blocks > most:
        return f"the kernels take at most {most} key blocks, and there are {problem.keys.num_blocks}"
    return None


def schedule_of(problem: Problem, width: int, device: int, consumers: int) -> Any:
    """The work tiles of query blocks, whose map names up to ``width`` key blocks for each of them."""
    side, of_layout = problem.queries, structures(problem.queries.segments is not None)
    rows = of_layout.IndexTable(width=width, num_rows=side.num_blocks, num_cols=problem.keys.num_blocks)
    return of_layout.Schedule(
        rows=rows,
        heads=divisor(side.heads),
        kv_group=divisor(problem.group),
        consumers=divisor(_consumers_of(side)),
        boxes_of_consumer=1,
        **_work_tiles(problem, side, device, consumers),
    )


def inverse_schedule_of(problem: Problem, device: int, boxes: int = 1) -> Any:
    """The work tiles of key blocks, so many boxes each, and the query blocks that name them."""
    side, columns = problem.keys, problem.queries.num_blocks
    rows = IndexBits(num_words=words_of(columns), num_rows=side.num_blocks, num_cols=columns, group=problem.group)
    return structures(side.segments is not None).InverseSchedule(
        rows=rows,
        heads=divisor(side.heads),
        kv_group=divisor(1),
        consumers=divisor(_consumers_of(side, boxes)),
        boxes_of_consumer=boxes,
        **_work_tiles(problem, side, device, 1, boxes),
    )


def words_of(bits: int) -> int:
    """Words of 32 bits that hold so many."""
    return -(-bits // 32)


def _consumers_of(side: Side, boxes: int = 1) -> int:
    """How many consumers take a block, so many boxes each."""
    return -(-side.block // (BOX_TOKENS * boxes))


def _work_tiles(problem: Problem, side: Side, device: int, consumers: int, boxes: int = 1) -> dict[str, Any]:
    """The fields of a schedule that number the work tiles.

    Args:
        consumers: of a thread block, each with so many ``boxes`` of a block.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    of_block, heads = _consumers_of(side, boxes), problem.batch * side.heads
    long_rows = 0 if side.segments is None else side.segments.num_context_blocks
    num_rows = side.num_blocks - long_rows
    first_heads, group_rows = _row_groups(num_rows, of_block, heads, processors, consumers)
    # Those of segments say which rows they divide.
    first_row = None if side.segments is None else long_rows
    partitions = [
        head_partition(num_rows, rows, of_block, consumers, first_row) for rows in (group_rows, max(1, group_rows - 1))
    ]
    fields: dict[str, Any] = {"first_heads": first_heads, "num_work_tiles": 0}
    if side.segments is not None:
        of_long = head_partition(long_rows, consumers, of_block, consumers, 0)
        partitions.append(of_long)
        fields["num_long_tiles"] = fields["num_work_tiles"] = heads * of_long.query_groups.value if long_rows else 0
    fields["partitions"] = (type(partitions[0]) * len(partitions))(*partitions)
    if num_rows > 0:
        fields["first_groups"] = first_heads * partitions[0].query_groups.value
        others = (heads - first_heads) * partitions[1].query_groups.value
        fields["num_work_tiles"] += fields["first_groups"] + others
    return fields


def max_list_length(rows: Side, columns: Side, width: int, consumers: int) -> int:
    """The most tiles that a work tile has, where each row names up to ``width`` columns."""
    boxes = rows.block // BOX_TOKENS
    if columns.segments is not None:
        # A row may name consecutive columns by its first entry alone.
        return columns.num_blocks * boxes
    # The consumers' boxes are consecutive: of at most two blocks where these have several boxes.
    num_rows = consumers if boxes == 1 else min(2, consumers)
    return min(num_rows * width, columns.num_blocks) * boxes


def head_partition(num_rows: int, group_rows: int, of_block: int, consumers: int, first_row: int | None = None) -> Any:
    """How the rows of a head are divided into row groups of at most ``group_rows``, and those into windows.

    Args:
        of_block: consumers that a block needs.
        consumers: of a thread block.
        first_row: of segments, the first of the rows in the order in which they are taken.
    """
    groups = max(1, -(-num_rows // group_rows))
    windows = -(-groups // (WINDOW_ROWS // consumers))
    # Where a block needs several consumers, only the last row group of a head is shorter: the others leave none idle.
    rows = divmod(num_rows, groups) if of_block == 1 else (group_rows, 0)
    bounds = () if first_row is None else (first_row, first_row + num_rows)
    fields = divisor(groups * of_block), *bounds, *rows, divisor(windows), *divmod(groups, windows)
    return structures(first_row is not None).HeadPartition(*fields)


def _row_groups(num_rows: int, of_block: int, heads: int, processors: int, consumers: int) -> tuple[int, int]:
    """How many heads have long row groups, and how many rows these have; those of the other heads have one less.

    Multiprocessors take a work tile each, round after round. Row groups are as short as they can be while the rounds
    are as few as those of the longest: a short one takes less time.
    """
    if of_block > 1 or num_rows == 0:
        return heads, consumers
    most = -(-heads * -(-num_rows // consumers) // processors) * processors
    rows = next(rows for rows in range(1, consumers + 1) if heads * -(-num_rows // rows) <= most)
    if rows == 1:
        return heads, rows
    long, short = -(-num_rows // rows), -(-num_rows // (rows - 1))
    return next(first for first in range(heads + 1) if first * long + (heads - first) * short <= most), rows
