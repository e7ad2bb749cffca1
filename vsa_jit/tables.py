"""Small tables of integers that kernels read: made on the host once, and kept on each device.

They follow from the shapes of calls, so that a call like an earlier one copies nothing. A table is copied on PyTorch's
current stream without waiting; another stream that uses it first waits for that copy, on the GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from vsa_jit import fastpath

_MOST_KEPT = 1024


class _Table(NamedTuple):
    values: Tensor
    stream: int
    copied: torch.cuda.Event | None


_kept: dict[tuple[Hashable, torch.device], _Table] = {}
_lock = threading.Lock()
# A CUDA graph reads a table's memory for as long as the graph lives, which nobody tells.
_captured: dict[tuple[Hashable, torch.device], _Table] = {}


def on_device(key: Hashable, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
    """The table of a key on a device.

    Args:
        make: computes it on the CPU.

    Raises:
        RuntimeError: a CUDA graph is being captured and the table is not there yet.
    """
    table = _kept.get((key, device)) or _captured.get((key, device))
    if device.type != "cuda":
        return (_add(key, device, make) if table is None else table).values
    if torch.cuda.is_current_stream_capturing():
        if table is None:
            raise RuntimeError(
                "vsa_jit: a CUDA graph is being captured of a call with segments that were not used before on "
                f"{device}; run the call once before the capture"
            )
        _captured[key, device] = table
    elif table is None:
        table = _add(key, device, make)
    elif table.copied is not None and fastpath.current_raw_stream(table.values.get_device()) != table.stream:
        stream = torch.cuda.current_stream(device)
        stream.wait_event(table.copied)
        table.values.record_stream(stream)
    return table.values


def _add(key: Hashable, device: torch.device, make: Callable[[], Tensor]) -> _Table:
    table = _copy(make(), device)
    with _lock:
        while len(_kept) >= _MOST_KEPT:
            # The oldest; that it was used since would have to be noted at every call.
            del _kept[next(iter(_kept))]
        _kept[key, device] = table
    return table


def _copy(source: Tensor, device: torch.device) -> _Table:
    if device.type != "cuda":
        return _Table(source.to(device), 0, None)
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
    return _Table(values, stream.cuda_stream, copied)
