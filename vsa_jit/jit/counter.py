"""Counters on the GPU that a kernel finds at zero, without a launch that clears them."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_counters: dict[tuple[int, int, int], Tensor] = {}


def counter(device: int) -> Tensor:
    """An int32 that is 0 when the next launch on the current stream of a device starts, if every launch leaves it so.

    Launches that may run at the same time have different ones: streams, the threads that launch (one handle stands for
    a stream in each thread), and CUDA graphs, which clear theirs whenever they run.
    """
    if torch.cuda.is_current_stream_capturing():
        return _cleared(device)
    key = device, torch._C._cuda_getCurrentRawStream(device), threading.get_ident()
    found = _counters.get(key)
    if found is None:
        found = _counters[key] = _cleared(device)
    return found


def _cleared(device: int) -> Tensor:
    return torch.zeros((), dtype=torch.int32, device=torch.device("cuda", device))
