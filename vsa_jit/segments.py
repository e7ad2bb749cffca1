"""How a sequence is divided into segments: videos, and plain tokens beside them, of one sample or of several."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Of each segment, see ``Segments.numbers``.
NUMBERS = 4


class Segment(NamedTuple):
    """Consecutive tokens: a video of size ``grid`` in raster order or, without a grid, plain tokens, which are context.

    Attributes:
        sample: number of the sample that it belongs to.
    """

    sample: int
    grid: tuple[int, int, int] | None
    length: int
    first_token: int
    first_block: int
    num_blocks: int


class Sample(NamedTuple):
    """The segments that attend each other: their blocks are consecutive."""

    number: int
    first_block: int
    num_blocks: int
    num_context_blocks: int

    @property
    def num_video_blocks(self) -> int:
        return self.num_blocks - self.num_context_blocks


class Segments:
    """The segments of a sequence, none of them empty, and their blocks. Blocks never straddle two segments.

    Equal ones are equal by value, so that what depends on them can be kept under them; the hash is computed once.

    Attributes:
        numbers: of each segment its sample, and T, H, W of a video or 0, 0 and how many plain tokens there are: what an
            operator is told.
        segments, samples: the records, in the order of their tokens.
    """

    def __init__(self, numbers: Sequence[int], tile: tuple[int, int, int]) -> None:
        self.numbers = tuple(numbers)
        self.tile = tile
        self.segments: list[Segment] = []
        self.samples: list[Sample] = []
        self.length = self.num_blocks = 0
        self._hash: int | None = None
        block = math.prod(tile)
        for i in range(0, len(numbers), NUMBERS):
            sample, frames, height, width = numbers[i : i + NUMBERS]
            is_video = frames != 0
            length = frames * height * width if is_video else width
            num_blocks = -(-length // block)
            if is_video:
                num_blocks = -(-frames // tile[0]) * -(-height // tile[1]) * -(-width // tile[2])
            grid = (frames, height, width) if is_video else None
            self.segments.append(Segment(sample, grid, length, self.length, self.num_blocks, num_blocks))
            before = Sample(sample, self.num_blocks, 0, 0)
            if self.samples and self.samples[-1].number == sample:
                before = self.samples.pop()
            context = before.num_context_blocks + (0 if is_video else num_blocks)
            self.samples.append(Sample(sample, before.first_block, before.num_blocks + num_blocks, context))
            self.length += length
            self.num_blocks += num_blocks

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Segments) and self.numbers == other.numbers and self.tile == other.tile

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash((self.numbers, self.tile))
        return self._hash

    @property
    def is_partial(self) -> bool:
        """Whether some block is cut by the end of its segment or the border of its video."""
        block = math.prod(self.tile)
        return any([segment.num_blocks * block != segment.length for segment in self.segments])

    @property
    def num_context_blocks(self) -> int:
        return sum([sample.num_context_blocks for sample in self.samples])


def selection_rows(segments: Segments, topk: Sequence[int], compete: bool) -> Tensor:
    """How each query block selects: int32 [n, 4] on the CPU.

    A row says which key blocks there are, from the first to the end; how many are selected, or less than 0 where all of
    them are; and whether the block itself, as keys, is selected by all others beside those of highest score.
    """
    rows = torch.empty((segments.num_blocks, 4), dtype=torch.int32)
    for sample, count in zip(segments.samples, topk, strict=True):
        end = sample.first_block + sample.num_blocks
        rows[sample.first_block : end] = torch.tensor([sample.first_block, end, sample.num_context_blocks + count, 0])
    samples = {sample.number: sample for sample in segments.samples}
    for segment in segments.segments:
        if segment.grid is None:
            of_segment = rows[segment.first_block : segment.first_block + segment.num_blocks]
            of_segment[:, 2] = -samples[segment.sample].num_blocks
            of_segment[:, 3] = not compete
    return rows


def selection_width(segments: Segments, topk: Sequence[int]) -> int:
    """The most key blocks that a query block names one by one: one that attends all of its sample names only these."""
    widths = [sample.num_context_blocks + count for sample, count in zip(segments.samples, topk, strict=True)]
    return functools.reduce(torch.sym_max, widths)


def width_of_selection(segments: Segments | None, topk: Sequence[int], num_kv_blocks: int) -> int:
    """Room for so many key blocks has each row of what is selected. Numbers may be symbolic."""
    if segments is not None:
        return selection_width(segments, topk)
    width = topk[0]
    return min(width, num_kv_blocks) if isinstance(width, int) and isinstance(num_kv_blocks, int) else width


def listed_width(segments: Segments, topk: Sequence[int]) -> int:
    """The most key blocks that a query block attends: of context, all of its sample."""
    widths = [sample.num_blocks for sample in segments.samples if sample.num_context_blocks > 0]
    return functools.reduce(torch.sym_max, [selection_width(segments, topk), *widths])


class Order(NamedTuple):
    """What the tokens of a sequence are: one video, several segments, or neither of them."""

    grid: tuple[int, int, int] | None
    segments: Segments | None


def order_of(numbers: Sequence[int] | None, tile: tuple[int, int, int]) -> Order:
    """The order that ``numbers`` describe, see ``Segments.numbers``; a single video is a grid."""
    if numbers is None:
        return Order(None, None)
    if len(numbers) == NUMBERS and numbers[1] != 0:
        return Order((numbers[1], numbers[2], numbers[3]), None)
    if torch.compiler.is_compiling():
        return Order(None, Segments(numbers, tile))
    try:
        return Order(None, _segments_of(tuple(numbers), tile))
    except TypeError:
        # Numbers that are symbolic have no hash.
        return Order(None, Segments(numbers, tile))


@functools.lru_cache(maxsize=1024)
def _segments_of(numbers: tuple[int, ...], tile: tuple[int, int, int]) -> Segments:
    return Segments(numbers, tile)
