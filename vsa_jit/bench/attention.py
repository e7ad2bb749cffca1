"""The calls that are measured: ours and PyTorch's dense attention, in either direction."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import vsa_jit
from vsa_jit.backends.choose import backends_for
from vsa_jit.bench.cases import Case, Inputs, Shape, flops_factor
from vsa_jit.bench.measure import median_ms, peak_mib
from vsa_jit.ops.video import coarse_branch
from vsa_jit.problem import bhsd

Attention = Callable[..., Tensor]

# The math backend keeps all scores; above this many bytes of them it is no serious competitor.
MAX_MATH_SCORES_BYTES = 1 << 30
SDPA_NAMES = {
    SDPBackend.CUDNN_ATTENTION: "cudnn",
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.EFFICIENT_ATTENTION: "efficient",
    SDPBackend.MATH: "math",
}


@dataclass(frozen=True)
class Run:
    """An attention function with the tensors to differentiate and the output's gradient."""

    attention: Attention
    inputs: tuple[Tensor, ...]
    dout: Tensor

    def forward(self) -> tuple[Tensor, ...]:
        """The output, as in inference."""
        with torch.no_grad():
            return (self.attention(*self.inputs),)

    def forward_backward(self) -> tuple[Tensor, ...]:
        """The inputs' gradients, as in a training step."""
        return self.step()()

    def results(self, direction: str) -> tuple[Tensor, ...]:
        """What the direction computes: the output, or the gradients."""
        return self.forward() if direction == "forward" else self.forward_backward()

    def call(self, direction: str) -> Callable[[], object]:
        """The forward in inference, or the backward alone."""
        if direction == "forward":
            return self.forward
        leaves = self._leaves()
        out = self.attention(*leaves)
        return lambda: torch.autograd.grad(out, leaves, self.dout, retain_graph=True)

    def step(self) -> Callable[[], tuple[Tensor, ...]]:
        """A forward and its backward, of tensors that are made once."""
        leaves = self._leaves()
        return lambda: torch.autograd.grad(self.attention(*leaves), leaves, self.dout)

    def median_ms(self, direction: str, seconds: float) -> float:
        return median_ms(self.call(direction), self.dout.device, seconds)

    def peak_mib(self, direction: str) -> float | None:
        """Of the forward in inference, or of a forward and its backward together: what a training step needs."""
        return peak_mib(lambda: self.results(direction), self.dout.device)

    def _leaves(self) -> tuple[Tensor, ...]:
        return tuple(x.detach().requires_grad_() for x in self.inputs)


def sparse(case: Case, inputs: Inputs, gate: str | None = None, selection_dtype: torch.dtype | None = None) -> Run:
    """The call that the case describes, or the same with another kind of gate, or selecting in another dtype."""
    kind = case.gate if gate is None else gate
    weight = 0.0 if kind == "off" else 1.0
    # Collected once: no part of a call's time.
    settings: dict[str, Any] = {
        "topk": case.selection.topk,
        "sparsity": case.selection.sparsity,
        "block_size": case.block_size,
        "context": case.context,
        **case.shape.order,
        "selection_dtype": selection_dtype,
        "backend": case.backend,
    }

    def attention(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None = None) -> Tensor:
        return vsa_jit.video_sparse_attn(q, k, v, compress_attn_weight=weight if gate is None else gate, **settings)

    gates = (inputs.gate,) if kind == "tensor" else ()
    return Run(attention, (inputs.q, inputs.k, inputs.v, *gates), inputs.dout)


def select(case: Case, inputs: Inputs, *, with_output: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the case's call selects, ``(q2k_idx, q2k_num)``, and its coarse output, or None."""
    problem, q, k, v = case.problem, inputs.q, inputs.k, inputs.v
    run = backends_for(problem, case.backend, q, k, v)
    numbers = case.topk_of_samples, case.compete, torch.float32
    results = coarse_branch(run, problem, q, k, v if with_output else None, None, None, *numbers)
    return results.q2k_idx, results.q2k_num, results.out_c


def all_blocks(case: Case, inputs: Inputs) -> Run:
    """The case's kernel with every key block of the sample selected: the same function as dense attention."""
    block_map = case.same_sample(inputs.device)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, _ = vsa_jit.block_sparse_attn(
            q,
            k,
            v,
            block_map,
            block_size=case.block_size,
            **case.shape.order,
            backend=case.backend,
        )
        return out

    return Run(attention, (inputs.q, inputs.k, inputs.v), inputs.dout)


def dense(inputs: Inputs) -> Run:
    """PyTorch's dense attention, on whichever of its backends is allowed around the call: a call for each sample."""
    layout, lengths = inputs.shape.layout, inputs.shape.sample_lengths

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        samples = zip(*(bhsd(x, layout).split(lengths, 2) for x in (q, k, v)), strict=True)
        outs = [F.scaled_dot_product_attention(*sample) for sample in samples]
        return bhsd(outs[0] if len(outs) == 1 else torch.cat(outs, 2), layout)

    return Run(attention, (inputs.q, inputs.k, inputs.v), inputs.dout)


@dataclass(frozen=True)
class DenseResult:
    """The fastest of PyTorch's backends; ``tflops`` in TFLOP/s."""

    name: str
    ms: float
    tflops: float
    peak_mib: float | None


def fastest_dense(inputs: Inputs, direction: str, seconds: float) -> DenseResult | None:
    """The fastest of PyTorch's backends that run this shape on this device, or None if none does."""
    best = None
    run = dense(inputs)
    for backend in _sdpa_candidates(inputs.shape, inputs.device):
        with _only(backend):
            try:
                ms = run.median_ms(direction, seconds)
                if best is None or ms < best.ms:
                    tflops = inputs.shape.dense_flops * flops_factor(direction) / ms * 1e-9
                    best = DenseResult(SDPA_NAMES[backend], ms, tflops, run.peak_mib(direction))
            except RuntimeError:
                # This backend has no kernel for the shape, or not the memory.
                continue
    return best


def flash_results(inputs: Inputs, direction: str) -> tuple[str, tuple[Tensor, ...]] | None:
    """What FlashAttention-2, PyTorch's flash backend, computes; from the next best backend where it does not run.

    Returns:
        The backend's name and the output or the gradients, or None where no backend runs.
    """
    run = dense(inputs)
    candidates = _sdpa_candidates(inputs.shape, inputs.device)
    for backend in sorted(candidates, key=lambda backend: backend != SDPBackend.FLASH_ATTENTION):
        with _only(backend):
            try:
                return SDPA_NAMES[backend], run.results(direction)
            except RuntimeError:
                continue
    return None


def _sdpa_candidates(shape: Shape, device: torch.device) -> list[SDPBackend]:
    candidates = [SDPBackend.FLASH_ATTENTION]
    if device.type == "cuda":
        candidates += [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    if shape.dense_pairs * 4 <= MAX_MATH_SCORES_BYTES:
        candidates.append(SDPBackend.MATH)
    return candidates


@contextmanager
def _only(backend: SDPBackend) -> Iterator[None]:
    """Allows one backend, without PyTorch's warnings about why it cannot run."""
    with warnings.catch_warnings(), sdpa_kernel(backend):
        warnings.simplefilter("ignore")
        yield
