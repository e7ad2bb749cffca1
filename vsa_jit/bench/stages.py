"""Where the time of a call goes, stage by stage, and a trace of all that ran."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

from vsa_jit.backends.base import Backend
from vsa_jit.backends.choose import backend_for
from vsa_jit.bench.attention import select, sparse
from vsa_jit.bench.cases import Case, Inputs
from vsa_jit.bench.measure import times_ms
from vsa_jit.problem import Coarse, MeanGradients, Operands

# A time is told from noise where it is so many times the standard error of its median.
RESOLVED = 3.0
# Of the median of normally distributed values, in standard errors of their mean; and a normal distribution's standard
# deviation in median absolute deviations.
MEDIAN_ERROR, DEVIATION = 1.2533, 1.4826
FEW = 10


@dataclass(frozen=True)
class Stage:
    """A part of a call.

    Attributes:
        ms: None where it cannot be told from noise.
        noise_ms: what cannot be told from noise.
        tflops: TFLOP/s, of the stages that attend keys.
    """

    name: str
    ms: float | None
    noise_ms: float
    tflops: float | None = None


@dataclass(frozen=True)
class _Part:
    """A stage as a call that does it, and the calls whose times are to be taken off since it does their work too."""

    name: str
    call: Callable[[], object]
    without: tuple[Callable[[], object], ...] = ()
    # Of the direction's work on the selected keys; None for what attends none.
    share: float | None = None


def breakdown(
    case: Case,
    inputs: Inputs,
    direction: str,
    seconds: float,
    flops: float,
    beside: Sequence[Callable[[], object]] = (),
) -> tuple[list[float], tuple[Stage, ...]]:
    """Calls the stages of one direction by themselves, in turn with the whole call, and times each.

    What a kernel does beside its main work is timed by difference: the combine in the forward kernel's epilogue, and
    the parts of the backward. The last stage is what the whole call took beyond the others: autograd, launches,
    allocation; less what it saved where launches overlap that are timed one by one, so that it may be within noise.

    Args:
        flops: of the direction's work on the selected keys.
        beside: other calls to time in turn with these.

    Returns:
        The median times of the whole call and of those beside it in milliseconds, and the stages.
    """
    stages = _Stages(case, inputs)
    parts = list(stages.forward() if direction == "forward" else stages.backward())
    whole = sparse(case, inputs).call(direction)
    calls = list(dict.fromkeys([whole, *(call for part in parts for call in (part.call, *part.without)), *beside]))
    times = dict(zip(calls, times_ms(calls, inputs.device, seconds), strict=True))
    rounds = [_differences(times[part.call], [times[call] for call in part.without]) for part in parts]
    timed = [
        _stage(part.name, of_part, part.share and flops * part.share)
        for part, of_part in zip(parts, rounds, strict=True)
    ]
    medians = [statistics.median(times[call]) for call in (whole, *beside)]
    return medians, (*timed, _stage("rest", _differences(times[whole], rounds)))


def _differences(times: Sequence[float], others: Sequence[Sequence[float]]) -> list[float]:
    """Round by round what a call took beyond others."""
    return [time - sum(rest) for time, *rest in zip(times, *others, strict=True)]


def _stage(name: str, times: Sequence[float], flops: float | None = None) -> Stage:
    ms = statistics.median(times)
    deviations = [abs(time - ms) for time in times]
    # The median of a few deviations may be small by chance.
    deviation = max(deviations) if len(times) < FEW else DEVIATION * statistics.median(deviations)
    noise = RESOLVED * MEDIAN_ERROR * deviation / math.sqrt(len(times))
    if ms <= noise:
        return Stage(name, None, max(noise, abs(ms)))
    return Stage(name, ms, noise, flops and flops / ms * 1e-9)


class _Stages:
    def __init__(self, case: Case, inputs: Inputs) -> None:
        self._case, self._inputs = case, inputs
        self._problem = case.problem
        self._with_coarse = case.gate != "off"
        self._gate = inputs.gate if case.gate == "tensor" else None
        self._gate_value = 1.0 if case.gate == "one" else 0.0
        self._coarse = Coarse(self._problem.keys.segments, self._problem.softmax_scale, torch.float32)

    def _runner_of(self, operator: str) -> Backend:
        inputs = self._inputs
        return backend_for(operator, self._problem, self._case.backend, inputs.q, inputs.k, inputs.v)

    def forward(self) -> Iterator[_Part]:
        problem, case = self._problem, self._case
        pooling, selection, attention = map(self._runner_of, ("block_means", "coarse_attend", "attend"))
        q, k, v = self._inputs.q, self._inputs.k, self._inputs.v
        v_or_none = v if self._with_coarse else None
        yield _Part("pooling", lambda: pooling.block_means(problem, q, k, v_or_none, None, None))

        q_c, k_c, v_c = pooling.block_means(problem, q, k, v_or_none, None, None)

        def coarse(v_c: Tensor | None) -> object:
            return selection.coarse_attend(self._coarse, q_c, k_c, v_c, None, case.topk_of_samples, case.compete)

        def alone() -> object:
            return coarse(None)

        yield _Part("scores, top-k", alone)
        if v_c is not None:
            yield _Part("coarse attention", lambda: coarse(v_c), (alone,))

        index, count, out_c = self._selection()

        def fine(out_c: Tensor | None) -> object:
            gate = None if out_c is None else self._gate
            operands = Operands(q, k, v, index, count, None, None, out_c, gate, self._gate_value)
            return attention.attend(problem, operands, False)

        def fine_alone() -> object:
            return fine(None)

        yield _Part("fine attention", fine_alone, share=1.0)
        if out_c is not None:
            yield _Part("combine (fused)", lambda: fine(out_c), (fine_alone,))

    def backward(self) -> Iterator[_Part]:
        problem = self._problem
        pooling, selection, attention, run = map(
            self._runner_of, ("block_means", "coarse_attend_backward", "attend", "attend_backward")
        )
        q, k, v, dout = self._inputs.q, self._inputs.k, self._inputs.v, self._inputs.dout
        index, count, out_c = self._selection()
        operands = Operands(q, k, v, index, count, None, None, out_c, self._gate, self._gate_value)
        keeps_out_s = self._gate is not None
        out, lse, out_s = attention.attend(problem, operands, keeps_out_s)

        def fine(need_dq: bool, need_dkv: bool, mean_gradients: MeanGradients | None = None) -> Callable[[], object]:
            return lambda: run.attend_backward(
                problem,
                operands,
                out if out_s is None else out_s,
                lse,
                dout,
                None,
                need_dq,
                need_dkv,
                out_c is not None and not keeps_out_s,
                mean_gradients,
            )

        both = fine(True, True)
        transpose_index = run.transpose_index
        if transpose_index is None:
            # Such a backend has nothing to prepare.
            yield _Part("fine attention", both, share=1.0)
        else:
            preparation = fine(False, False)
            yield _Part("preparation", preparation)

            def inversion() -> object:
                return transpose_index(problem, operands)

            yield _Part("inversion", inversion)
            # The inversion counts by itself, though a backend may make it beside the preparation.
            if run.takes_one_pass is not None and run.takes_one_pass(problem):
                yield _Part("dq, dk, dv", both, (preparation, inversion), 1.0)
            else:
                # By itself dq takes three of a backward's five matrix products, dk with dv four: both need the scores.
                yield _Part("dq", fine(True, False), (preparation,), 3 / 5)
                yield _Part("dk, dv", fine(False, True), (preparation, inversion), 4 / 5)
        if out_c is None:
            return

        means = cast("tuple[Tensor, Tensor, Tensor]", pooling.block_means(problem, q, k, v, None, None))
        yield _Part(
            "coarse attention",
            lambda: selection.coarse_attend_backward(self._coarse, *means, None, cast(Tensor, out_c)),
        )
        yield _Part("means (fused)", fine(True, True, lambda _: means), (both,))

    def _selection(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return select(self._case, self._inputs, with_output=self._with_coarse)


def write_trace(case: Case, inputs: Inputs, path: Path) -> None:
    """Writes a Chrome trace of one forward and backward of the case, after one that was not recorded."""
    run = sparse(case, inputs)
    run.forward_backward()
    activities = [ProfilerActivity.CPU]
    if inputs.device.type == "cuda":
        torch.cuda.synchronize(inputs.device)
        activities.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        run.forward_backward()
        if inputs.device.type == "cuda":
            torch.cuda.synchronize(inputs.device)
    profiler.export_chrome_trace(str(path))
