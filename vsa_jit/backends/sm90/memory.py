"""Parts of one allocation: to allocate each by itself takes as much of the host's time as a launch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Each part starts at a multiple of so many bytes.
ALIGNMENT = 256
WORD_BYTES = 4
_new_tuple: Any = tuple.__new__


class Part(NamedTuple):
    """A contiguous array of 32-bit numbers in an allocation, which launches take like a tensor."""

    address: int
    shape: tuple[int, ...]

    def tensor(self, memory: Tensor, dtype: torch.dtype) -> Tensor:
        """The part as a view of the allocation, uint8, that it is of; ``dtype`` has 32 bits."""
        start = self.address - memory.data_ptr()
        return memory[start : start + math.prod(self.shape) * WORD_BYTES].view(dtype).view(self.shape)

    def data_ptr(self) -> int:
        return self.address

    def contiguous(self) -> Part:
        return self


class Parts(NamedTuple):
    """How arrays of 32-bit numbers share an allocation.

    Attributes:
        starts_and_shapes: of each, in bytes and in numbers.
        num_bytes: of all.
    """

    starts_and_shapes: tuple[tuple[int, tuple[int, ...]], ...]
    num_bytes: int

    @classmethod
    def of(cls, *shapes: Sequence[int]) -> Parts:
        sizes = [-(-math.prod(shape) * WORD_BYTES // ALIGNMENT) * ALIGNMENT for shape in shapes]
        *starts, num_bytes = itertools.accumulate(sizes, initial=0)
        return cls(tuple(zip(starts, map(tuple, shapes), strict=True)), num_bytes)

    def at(self, address: int) -> list[Part]:
        """The parts of an allocation that starts there."""
        # What a named tuple's own constructor does, in a third of the time: every call passes here several times.
        return [_new_tuple(Part, (address + start, shape)) for start, shape in self.starts_and_shapes]
