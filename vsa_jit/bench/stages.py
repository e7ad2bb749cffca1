"""Where the time of a call goes, stage by stage, and a trace of all that ran."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity

from vsa_jit.backends.choose import backend_for
from vsa_jit.bench.attention import sparse
from vsa_jit.bench.cases import Case, Inputs, flops_factor
from vsa_jit.bench.measure import median_ms
from vsa_jit.coarse import coarse_branch
from vsa_jit.problem import Operands


@dataclass(frozen=True)
class Stage:
    """``tflops`` in TFLOP/s, of the stages that attend keys."""

    name: str
    ms: float
    tflops: float | None = None


def breakdown(case: Case, inputs: Inputs, direction: str, total_ms: float, seconds: float) -> Iterator[Stage]:
    """Calls the stages of one direction by themselves and times each.

    What a kernel does beside its main work is timed by difference: the combine in the forward kernel's epilogue, and
    the parts of the backward. The last stage is what the whole call took beyond them: autograd, launches, allocation;
    it is negative where stages cost less together than each by itself.
    """
    stages = _Stages(case, inputs, seconds)
    parts = list(stages.forward() if direction == "forward" else stages.backward())
    yield from parts
    yield Stage("rest", total_ms - sum(part.ms for part in parts))


class _Stages:
    def __init__(self, case: Case, inputs: Inputs, seconds: float) -> None:
        self._case, self._inputs, self._seconds = case, inputs, seconds
        self._problem = case.problem
        self._run = backend_for(case.problem, inputs.q, inputs.k, inputs.v)
        self._with_coarse = case.gate != "off"
        self._gate = inputs.gate if case.gate == "tensor" else None
        self._gate_value = 1.0 if case.gate == "one" else 0.0

    def _ms(self, call: Callable[[], object]) -> float:
        return median_ms(call, self._inputs.device, self._seconds)

    def _attention(self, name: str, ms: float, direction: str, share: float = 1.0) -> Stage:
        flops = self._case.flops * flops_factor(direction) * share
        return Stage(name, ms, flops / ms * 1e-9 if ms > 0.0 else None)

    def forward(self) -> Iterator[Stage]:
        problem, run, case = self._problem, self._run, self._case
        q, k, v = self._inputs.q, self._inputs.k, self._inputs.v
        v_or_none = v if self._with_coarse else None
        yield Stage("pooling", self._ms(lambda: run.block_means(problem, q, k, v_or_none, None, None)))

        q_c, k_c, v_c = run.block_means(problem, q, k, v_or_none, None, None)
        yield Stage("scores", self._ms(lambda: q_c @ k_c.mT))

        scores = (q_c @ k_c.mT).flatten(0, 1)
        q2k_idx = q.new_empty((*scores.shape[:2], case.topk), dtype=torch.int32)
        q2k_num = q.new_empty(scores.shape[:2], dtype=torch.int32)
        yield Stage("top-k", self._ms(lambda: run.select(scores, None, case.topk, q2k_idx, q2k_num)))

        if v_c is not None:
            scale = problem.softmax_scale
            yield Stage(
                "coarse attention",
                self._ms(lambda: F.scaled_dot_product_attention(q_c, k_c, v_c, scale=scale)),
            )

        index, count, out_c = self._selection()

        def fine(out_c: Tensor | None) -> object:
            gate = None if out_c is None else self._gate
            operands = Operands(q, k, v, index, count, None, None, out_c, gate, self._gate_value)
            return run.forward(problem, operands, False)

        fine_ms = self._ms(lambda: fine(None))
        yield self._attention("fine attention", fine_ms, "forward")
        if out_c is not None:
            yield Stage("combine (fused)", self._ms(lambda: fine(out_c)) - fine_ms)

    def backward(self) -> Iterator[Stage]:
        problem, run = self._problem, self._run
        q, k, v, dout = self._inputs.q, self._inputs.k, self._inputs.v, self._inputs.dout
        index, count, out_c = self._selection()
        operands = Operands(q, k, v, index, count, None, None, out_c, self._gate, self._gate_value)
        out_s, lse, _ = run.forward(problem, operands._replace(out_c=None, gate=None), False)

        def fine(need_dq: bool, need_dkv: bool) -> float:
            return self._ms(lambda: run.backward(problem, operands, out_s, lse, dout, None, need_dq, need_dkv))

        invert: Any = getattr(run, "invert", None)
        if invert is None:
            # A backend that does not walk the map by key block computes all gradients in one pass.
            yield self._attention("fine attention", fine(True, True), "backward")
        else:
            preparation = fine(False, False)
            yield Stage("preparation", preparation)
            inversion = self._ms(lambda: invert(problem, index, count))
            yield Stage("inversion", inversion)
            # By itself dq takes three of a backward's five matrix products, dk with dv four: both need the scores.
            yield self._attention("dq", fine(True, False) - preparation, "backward", 3 / 5)
            yield self._attention("dk, dv", fine(False, True) - preparation - inversion, "backward", 4 / 5)
        if out_c is None:
            return

        means = [x.requires_grad_() for x in run.block_means(problem, q, k, v, None, None) if x is not None]
        coarse = F.scaled_dot_product_attention(means[0], means[1], means[2], scale=problem.softmax_scale)
        yield Stage(
            "coarse attention",
            self._ms(lambda: torch.autograd.grad(coarse, means, out_c, retain_graph=True)),
        )

        def spread() -> None:
            for mean, x in zip(means, (q, k, v), strict=True):
                run.block_mean_backward(problem, mean.detach(), x, None)

        yield Stage("means", self._ms(spread))

    def _selection(self) -> tuple[Tensor, Tensor, Tensor | None]:
        inputs = self._inputs
        return coarse_branch(
            self._problem, inputs.q, inputs.k, inputs.v, None, None, self._case.topk, with_output=self._with_coarse
        )


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
