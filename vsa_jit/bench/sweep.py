"""Runs the cases of a sweep: check first, measure only what passed."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from vsa_jit.backends.choose import Choice
from vsa_jit.bench import attention, stages
from vsa_jit.bench.attention import DenseResult
from vsa_jit.bench.cases import Case, Inputs, flops_factor
from vsa_jit.bench.check import Checked, Metrics, check, metrics
from vsa_jit.bench.measure import times_ms
from vsa_jit.bench.peers import Peer, PeerResult, check_peer
from vsa_jit.bench.stages import Stage

OK = "ok"
FAILED = "FAILED"
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Timing:
    """Of the whole call; ``speedup`` over dense attention, None where no dense attention ran."""

    ms: float
    tflops: float
    speedup: float | None
    peak_mib: float | None


@dataclass(frozen=True)
class Precision:
    """Results against dense attention by PyTorch's backend ``against``.

    ``same_keys``: the kernel with every key block selected, so that nothing but rounding differs. ``approximation``:
    the case's own selection without the coarse branch, so that what was left out differs as well.
    """

    against: str
    same_keys: Metrics
    approximation: Metrics


@dataclass(frozen=True)
class Row:
    """One direction of one case. ``timing`` is None unless ``status`` is ok: only checked outputs have a speed."""

    case: Case
    backend: str
    engine: str | None
    direction: str
    status: str
    checked: Checked | None = None
    precision: Precision | None = None
    timing: Timing | None = None
    dense: DenseResult | None = None
    stages: tuple[Stage, ...] = ()
    peers: tuple[PeerResult, ...] = ()


def sweep(
    cases: Sequence[Case],
    directions: Sequence[str],
    device: torch.device,
    *,
    seconds: float,
    seed: int,
    profile: bool,
    peers: Sequence[Peer] = (),
    on_start: Callable[[Case, str], None],
) -> Iterator[Row]:
    """Yields a row for each case and direction; ``on_start`` is told before each.

    Cases of one shape must be neighbours: they share inputs and the dense measurements.
    """
    for shape, group in itertools.groupby(cases, key=lambda case: case.shape):
        beside: _Dense | None = None
        for case, direction in itertools.product(group, directions):
            on_start(case, direction)
            choice = case.choice(device)
            try:
                beside = beside or _Dense(Inputs.random(shape, device, seed), seconds)
                row = _row(case, choice, direction, beside, seconds, seed, profile, peers)
            except RuntimeError as error:
                # PyTorch's own class on a GPU, a plain error of its allocator on a CPU.
                if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
                    raise
                row = Row(case, choice.backend, choice.engine, direction, OUT_OF_MEMORY)
            yield row


class _Dense:
    """What the rows of one shape are compared with, each part computed when a row first needs it."""

    def __init__(self, inputs: Inputs, seconds: float) -> None:
        self.inputs = inputs
        self._seconds = seconds
        self._fastest: dict[str, DenseResult | None] = {}
        self._flash: dict[str, tuple[str, tuple[torch.Tensor, ...]] | None] = {}
        self._same_keys: dict[tuple[object, ...], Metrics] = {}

    def fastest(self, direction: str) -> DenseResult | None:
        if direction not in self._fastest:
            self._fastest[direction] = attention.fastest_dense(self.inputs, direction, self._seconds)
        return self._fastest[direction]

    def precision(self, case: Case, direction: str) -> Precision | None:
        if direction not in self._flash:
            self._flash[direction] = attention.flash_results(self.inputs, direction)
        flash = self._flash[direction]
        if flash is None:
            return None
        name, wanted = flash
        key = (case.block_size, case.backend, direction)
        if key not in self._same_keys:
            self._same_keys[key] = metrics(attention.all_blocks(case, self.inputs).results(direction), wanted)
        fine = attention.sparse(case, self.inputs, gate="off")
        return Precision(name, self._same_keys[key], metrics(fine.results(direction), wanted))


def _row(
    case: Case,
    choice: Choice,
    direction: str,
    beside: _Dense,
    seconds: float,
    seed: int,
    profile: bool,
    peers: Sequence[Peer],
) -> Row:
    inputs = beside.inputs
    identity = (case, choice.backend, choice.engine, direction)
    run = attention.sparse(case, inputs)
    checked = check(case, inputs, run.results(direction), direction, seed)
    if not checked.ok:
        return Row(*identity, FAILED, checked)
    q2k_idx, q2k_num, _ = attention.select(case, inputs)
    flops = case.flops_of(q2k_idx, q2k_num) * flops_factor(direction)
    ms, breakdown, results = _measure(case, inputs, checked, direction, seconds, flops, profile, peers)
    dense = beside.fastest(direction)
    timing = Timing(
        ms,
        tflops=flops / ms * 1e-9,
        speedup=None if dense is None else dense.ms / ms,
        peak_mib=run.peak_mib(direction),
    )
    precision = beside.precision(case, direction)
    return Row(*identity, OK, checked, precision, timing, dense, breakdown, results)


def _measure(
    case: Case,
    inputs: Inputs,
    checked: Checked,
    direction: str,
    seconds: float,
    flops: float,
    profile: bool,
    peers: Sequence[Peer],
) -> tuple[float, tuple[Stage, ...], tuple[PeerResult, ...]]:
    """The time of the call in ms, its stages, and its peers, whose memory is free again when this returns."""
    compared = [check_peer(peer, case, inputs, checked, direction) for peer in peers]
    calls = [call for _, call in compared if call is not None]
    if profile:
        (ms, *others), breakdown = stages.breakdown(case, inputs, direction, seconds, flops, calls)
    else:
        times = times_ms([attention.sparse(case, inputs).call(direction), *calls], inputs.device, seconds)
        (ms, *others), breakdown = map(statistics.median, times), ()
    remaining = iter(others)
    results = [
        result if call is None else replace(result, ms=(of_peer := next(remaining)), ratio=of_peer / ms)
        for result, call in compared
    ]
    return ms, breakdown, tuple(results)
