"""Times and peak memory of a call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

MIB = 1 << 20
# Written before each measured call, so that the call finds none of its inputs in the L2 cache.
L2_FLUSH_BYTES = 256 * MIB
WARM_UP_SECONDS = 0.025
MIN_REPEATS = 3
MAX_REPEATS = 1000


def median_ms(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Median time of a call in milliseconds, over as many repeats as fit ``seconds`` (at least a few)."""
    call()
    return _cuda_median_ms(call, device, seconds) if device.type == "cuda" else _cpu_median_ms(call, seconds)


def _repeats(seconds: float, seconds_per_call: float) -> int:
    return max(MIN_REPEATS, min(int(seconds / max(seconds_per_call, 1e-7)), MAX_REPEATS))


def _cpu_median_ms(call: Callable[[], object], seconds: float) -> float:
    def measure() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    times = [measure()]
    times += [measure() for _ in range(_repeats(seconds, times[0]) - 1)]
    return 1e3 * statistics.median(times)


def _cuda_median_ms(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    with torch.cuda.device(device):
        flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=device)

        def measure(repeats: int) -> list[float]:
            events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
            for start, end in events:
                flush.zero_()
                start.record()
                call()
                end.record()
            torch.cuda.synchronize()
            return [start.elapsed_time(end) for start, end in events]

        first_ms = statistics.median(measure(MIN_REPEATS))
        estimate = 1e-3 * first_ms
        if estimate >= seconds:
            # A call so long has warmed up by its first run, and more of them would only take the user's time.
            return first_ms
        measure(_repeats(WARM_UP_SECONDS, estimate))
        return statistics.median(measure(_repeats(seconds, estimate)))


def peak_mib(call: Callable[[], object], device: torch.device) -> float | None:
    """Most device memory that a call held at one time above what was allocated before it, its result included.

    None on a CPU, where PyTorch does not count.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / MIB
