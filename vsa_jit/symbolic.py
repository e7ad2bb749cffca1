"""Numbers that ``torch.compile`` keeps symbolic, so that a schedule of them is not compiled value after value.

It does so for a float argument that changes; but a float that reaches an operator, or decides a shape, becomes a
constant again. A tensor of no dimensions does not, and neither does an integer that is read from one.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from vsa_jit.fastpath import assume, reading_symbolic_ints


def is_symbolic(number: float) -> bool:
    """Whether a program is being traced that is to run with other values of this number."""
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return not has_static_value(number)


def as_tensor(number: float) -> Tensor:
    """fp64, on the CPU, where reading it waits for nothing."""
    return torch.ones((), dtype=torch.float64, device="cpu") * number


def as_int(number: Tensor, least: int, most: int) -> int:
    """A tensor of no dimensions as an integer, which is clamped to ``least`` … ``most``."""
    with reading_symbolic_ints():
        value = cast(int, number.to(torch.int64).clamp(least, most).item())
    assume(value >= least)
    assume(value <= most)
    return value
