"""Calls that look like an earlier one: what was found out about that one holds for them too."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# Calls that look different, before all are forgotten.
_MOST_KEPT = 1024


class LookAlikes(Generic[T]):
    """Something for each call, by its settings and by what its tensors look like.

    Two tensors look alike that have the same type, dtype, device, shape, strides, need of a gradient and dispatch keys:
    all that a check may depend on but the values. Tensors of a call are told apart by their order, and a call that has
    one of them twice is not kept. No tensor is.
    """

    def __init__(self) -> None:
        self._kept: dict[str, list[tuple[Callable[..., bool], T]]] = {}
        self._count = 0

    def find(self, settings: Sequence[Any], tensors: Sequence[Any]) -> T | None:
        """What is kept for a call that looks like this one, or None."""
        for looks_alike, value in self._kept.get(_text(settings, tensors), ()):
            if looks_alike(*tensors):
                return value
        return None

    def keep(self, settings: Sequence[Any], tensors: Sequence[Tensor], value: T) -> None:
        """Keeps a value for calls that look like this one."""
        looks_alike = _looks_like(tensors)
        if looks_alike is None or not looks_alike(*tensors):
            return
        if self._count >= _MOST_KEPT:
            self._kept.clear()
            self._count = 0
        self._kept.setdefault(_text(settings, tensors), []).append((looks_alike, value))
        self._count += 1


def _text(settings: Sequence[Any], tensors: Sequence[Any]) -> str:
    """What tells calls apart but for their tensors' looks. As text, 64 differs from 64.0, and 1 from True."""
    return f"{len(tensors)} {settings!r}"


def _looks_like(tensors: Sequence[Tensor]) -> Callable[..., bool] | None:
    """Whether others look like these: PyTorch's own guards, which its compiler asks at every call of what it compiled.

    In Python the same takes longer than a launch. A PyTorch without them keeps nothing.
    """
    guards = _tensor_guards()
    if guards is None:
        return None
    sizes, strides = ([list(of(x)) for x in tensors] for of in (Tensor.size, Tensor.stride))
    return guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check


@functools.cache
def _tensor_guards() -> Callable[..., Any] | None:
    return getattr(torch._C._dynamo.guards, "TensorGuards", None)
