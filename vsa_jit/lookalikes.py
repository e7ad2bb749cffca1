"""Calls that look like an earlier one: what was found out about that one holds for them too."""

from __future__ import annotations

import functools
import marshal
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# Tensors that are no more than that.
PLAIN = (Tensor, torch.nn.Parameter)
# Calls that differ in more than settings and shapes, before the oldest is forgotten, and all calls, before all are.
_MOST_OF_A_KIND = 8
_MOST_KEPT = 1024


class LookAlikes(Generic[T]):
    """Something for each call, by its settings, by what its tensors look like and by whether gradients are recorded.

    Two tensors look alike that have the same type, dtype, device, shape, strides, need of a gradient and dispatch keys:
    all that a check may depend on but the values. Tensors of a call are told apart by their order. Calls are not kept
    that have a tensor of a subclass, one tensor twice, or settings that are not plain numbers, strings, None and
    sequences of those. No tensor is kept.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple, list[tuple[Callable[..., bool], T]]] = {}
        self._count = 0

    def find(self, settings: tuple, tensors: Sequence[Any]) -> T | None:
        """What is kept for a call that looks like this one, or None."""
        for looks_alike, value in self._kept.get(_kind(settings, tensors), ()):
            if looks_alike(*tensors):
                return value
        return None

    def keep(self, settings: tuple, tensors: Sequence[Tensor], value: T) -> None:
        """Keeps a value for calls that look like this one."""
        kind, guards = _kind(settings, tensors), _tensor_guards()
        if kind == () or guards is None or len(set(map(id, tensors))) < len(tensors):
            return
        if self._count >= _MOST_KEPT:
            self._kept.clear()
            self._count = 0
        sizes, strides = ([list(of(x)) for x in tensors] for of in (Tensor.size, Tensor.stride))
        looks_alike = guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
        kept = self._kept.get(kind, [])
        self._kept[kind] = [*kept[1 - _MOST_OF_A_KIND :], (looks_alike, value)]
        self._count += len(self._kept[kind]) - len(kept)


def _kind(settings: tuple, tensors: Sequence[Any]) -> tuple:
    """What tells calls apart at a glance; empty where none like it is kept.

    As bytes, 64 differs from 64.0, and 1 from True; what could change later, or claim to be what it is not, has none.
    """
    shapes = []
    for x in tensors:
        if type(x) not in PLAIN:
            return ()
        shapes.append(x.shape)
    try:
        return torch.is_grad_enabled(), marshal.dumps(settings, 2), *shapes
    except ValueError:
        return ()


@functools.cache
def _tensor_guards() -> Callable[..., Any] | None:
    """PyTorch's own test whether tensors look like others, which its compiler runs at every call of what it compiled.

    In Python the same takes longer than a launch. Where a PyTorch has none, nothing is kept.
    """
    try:
        from torch._C._dynamo.guards import TensorGuards
    except ImportError:
        return None
    return TensorGuards
