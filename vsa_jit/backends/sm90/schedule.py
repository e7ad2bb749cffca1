"""The host's side of ``scheduler.cuh``: how the query boxes of a call are divided into work tiles."""

from __future__ import annotations

from vsa_jit.backends.sm90.layout import divisor
from vsa_jit.backends.sm90.structs import BOX_TOKENS, CONSUMERS, HeadPartition, IndexTable, Schedule
from vsa_jit.problem import Problem

# Row groups of a window: one lane of a warp ranks each of its rows.
WINDOW_GROUPS = 32 // CONSUMERS
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


def schedule_of(problem: Problem, width: int, processors: int) -> Schedule:
    """The work tiles of a call whose map names up to ``width`` key blocks for each query block."""
    num_rows, boxes = problem.queries.num_blocks, problem.block // BOX_TOKENS
    heads = problem.batch * problem.queries.heads
    first_heads, group_rows = _row_groups(num_rows, boxes, heads, processors)
    partitions = [head_partition(num_rows, rows, boxes) for rows in (group_rows, max(1, group_rows - 1))]
    first_groups = first_heads * partitions[0].query_groups.value
    return Schedule(
        rows=IndexTable(width=width, num_rows=num_rows, num_cols=problem.keys.num_blocks),
        partitions=(HeadPartition * 2)(*partitions),
        first_heads=first_heads,
        first_groups=first_groups,
        num_work_tiles=first_groups + (heads - first_heads) * partitions[1].query_groups.value,
        heads=divisor(problem.queries.heads),
        kv_group=divisor(problem.group),
    )


def max_list_length(problem: Problem, width: int) -> int:
    """The most key tiles that a work tile has."""
    boxes = problem.block // BOX_TOKENS
    # The consumers' boxes are consecutive: of at most two blocks where these have several boxes.
    rows = CONSUMERS if boxes == 1 else 2
    return min(rows * width, problem.keys.num_blocks) * boxes


def head_partition(num_rows: int, group_rows: int, boxes: int) -> HeadPartition:
    """How the rows of a head are divided into row groups of at most ``group_rows``, and those into windows."""
    groups = -(-num_rows // group_rows)
    windows = -(-groups // WINDOW_GROUPS)
    # Where blocks have several boxes, only the last row group of a head is shorter: the others leave no consumer idle.
    rows = divmod(num_rows, groups) if boxes == 1 else (group_rows, 0)
    return HeadPartition(divisor(groups * boxes), *rows, divisor(windows), *divmod(groups, windows))


def _row_groups(num_rows: int, boxes: int, heads: int, processors: int) -> tuple[int, int]:
    """How many heads have long row groups, and how many rows these have; those of the other heads have one less.

    Multiprocessors take a work tile each, round after round. Row groups are as short as they can be while the rounds
    are as few as those of the longest: a short one takes less time.
    """
    if boxes > 1:
        return heads, CONSUMERS
    most = -(-heads * -(-num_rows // CONSUMERS) // processors) * processors
    rows = next(rows for rows in range(1, CONSUMERS + 1) if heads * -(-num_rows // rows) <= most)
    if rows == 1:
        return heads, rows
    long, short = -(-num_rows // rows), -(-num_rows // (rows - 1))
    return next(first for first in range(heads + 1) if first * long + (heads - first) * short <= most), rows
