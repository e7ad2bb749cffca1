"""Parts of one allocation: to allocate each by itself takes as much of the host's time as a launch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Each part starts at a multiple of so many bytes.
ALIGNMENT = 256
WORD_BYTES = 4


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
        num_bytes: of all.
    """

    starts: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    num_bytes: int

    @classmethod
    def of(cls, *shapes: Sequence[int]) -> Parts:
        sizes = [-(-math.prod(shape) * WORD_BYTES // ALIGNMENT) * ALIGNMENT for shape in shapes]
        *starts, num_bytes = itertools.accumulate(sizes, initial=0)
        return cls(tuple(starts), tuple(map(tuple, shapes)), num_bytes)

    def at(self, address: int) -> list[Part]:
        """The parts of an allocation that starts there."""
        return [Part(address + start, shape) for start, shape in zip(self.starts, self.shapes, strict=True)]
