"""Small tables of integers that kernels read: made on the host once, and kept on each device.

They follow from the shapes of calls, so that a call like an earlier one copies nothing. A table is copied on PyTorch's
current stream without waiting; another stream that uses it first waits for that copy, on the GPU.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

_MOST_KEPT = 1024


class _Table(NamedTuple):
    values: Tensor
    # Kept for the copy: its source must not be overwritten.
    source: Tensor
    stream: torch.cuda.Stream | None
    copied: torch.cuda.Event | None


_kept: OrderedDict[tuple[Hashable, torch.device], _Table] = OrderedDict()
# A CUDA graph reads a table's memory for as long as the graph lives, which nobody tells.
_captured: dict[tuple[Hashable, torch.device], _Table] = {}


def on_device(key: Hashable, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
    """The table of a key on a device.

    Args:
        make: computes it on the CPU.

    Raises:
        RuntimeError: a CUDA graph is being captured and the table is not there yet.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    full_key = (key, device)
    table = _kept.get(full_key)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if table is None:
        if capturing:
            raise RuntimeError(
                "vsa_jit: a CUDA graph is being captured of a call with segments that were not used before on "
                f"{device}; run the call once before the capture"
            )
        table = _copy(make(), device)
        _kept[full_key] = table
        if len(_kept) > _MOST_KEPT:
            _kept.popitem(last=False)
        return table.values
    _kept.move_to_end(full_key)
    if capturing:
        _captured[full_key] = table
    elif table.copied is not None:
        stream = torch.cuda.current_stream(device)
        if stream != table.stream:
            stream.wait_event(table.copied)
            table.values.record_stream(stream)
    return table.values


def _copy(source: Tensor, device: torch.device) -> _Table:
    if device.type != "cuda":
        return _Table(source.to(device), source, None, None)
    stream = torch.cuda.current_stream(device)
    # What this thread allocates now may belong to the memory of a CUDA graph that torch.compile prepares, which ends
    # with the graph. Another thread's does not.
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(_copy_on, stream, source, device).result()


def _copy_on(stream: torch.cuda.Stream, source: Tensor, device: torch.device) -> _Table:
    source = source.pin_memory()
    with torch.cuda.stream(stream):
        values = source.to(device, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(stream)
    return _Table(values, source, stream, copied)
