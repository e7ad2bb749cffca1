"""Times and peak memory of a call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

MIB = 1 << 20
# Written before each measured call, so that the call finds none of its inputs in the L2 cache.
L2_FLUSH_BYTES = 256 * MIB
WARM_UP_SECONDS = 0.025
MIN_REPEATS = 3
MAX_REPEATS = 1000
HOST_ROUNDS = 21


def median_ms(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Median time of a call in milliseconds, over as many repeats as fit ``seconds`` (at least a few)."""
    (times,) = times_ms([call], device, seconds)
    return statistics.median(times)


def times_ms(calls: Sequence[Callable[[], object]], device: torch.device, seconds: float) -> list[list[float]]:
    """Times of several calls in milliseconds, a list for each, as many as fit ``seconds`` for each (at least a few).

    Calls are made in turn, round after round, so that whatever drifts meets all of them: a difference of two calls is
    best taken round by round.
    """
    for call in calls:
        call()
    return _cuda_times_ms(calls, device, seconds) if device.type == "cuda" else _cpu_times_ms(calls, seconds)


def _repeats(seconds: float, seconds_per_call: float) -> int:
    return max(MIN_REPEATS, min(int(seconds / max(seconds_per_call, 1e-7)), MAX_REPEATS))


def _cpu_times_ms(calls: Sequence[Callable[[], object]], seconds: float) -> list[list[float]]:
    def measure(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)

    rounds = [[measure(call) for call in calls]]
    repeats = _repeats(seconds * len(calls), 1e-3 * sum(rounds[0]))
    rounds += [[measure(call) for call in calls] for _ in range(repeats - 1)]
    return [list(times) for times in zip(*rounds, strict=True)]


def _cuda_times_ms(calls: Sequence[Callable[[], object]], device: torch.device, seconds: float) -> list[list[float]]:
    with torch.cuda.device(device):
        flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=device)

        def measure(repeats: int) -> list[list[float]]:
            times: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in calls]
            for _ in range(repeats):
                for call, events in zip(calls, times, strict=True):
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    flush.zero_()
                    start.record()
                    call()
                    end.record()
                    events.append((start, end))
            torch.cuda.synchronize()
            return [[start.elapsed_time(end) for start, end in events] for events in times]

        first = measure(MIN_REPEATS)
        estimate = 1e-3 * sum(map(statistics.median, first))
        if estimate >= seconds * len(calls):
            # Calls so long have warmed up by their first run, and more of them would only take the user's time.
            return first
        measure(_repeats(WARM_UP_SECONDS * len(calls), estimate))
        return measure(_repeats(seconds * len(calls), estimate))


def host_times_us(call: Callable[[], object], device: torch.device, calls: int) -> list[float]:
    """What a call takes of the host's time in microseconds, on average over ``calls`` in each of several rounds.

    A GPU is waited for between rounds only: its queue has to hold all calls of a round.
    """
    rounds = []
    for _ in range(HOST_ROUNDS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        rounds.append(1e6 * (time.perf_counter() - start) / calls)
    return rounds


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
