"""The backends, fastest first, and the one chooser that gives a reason.

A backend is an entry of ``ENTRIES`` and a module of its name with the functions of ``Backend``, imported when a call
first runs on it: a machine without its packages never needs them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from vsa_jit.problem import Gradients, Operands, Problem

ENVIRONMENT_VARIABLE = "VSA_JIT_BACKEND"
OLDEST_TRITON_CAPABILITY = (8, 0)

_logger = logging.getLogger("vsa_jit")
_logged: set[tuple[str, ...]] = set()


class Backend(Protocol):
    """What a backend's module offers. ``vsa_jit.ops`` has one operator for each, and says there what it computes."""

    def block_means(
        self, problem: Problem, q: Tensor, k: Tensor, v: Tensor | None, q_sizes: Tensor | None, kv_sizes: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]: ...

    def block_mean_backward(self, problem: Problem, dmean: Tensor, x: Tensor, sizes: Tensor | None) -> Tensor: ...

    def select(self, scores: Tensor, kv_sizes: Tensor | None, topk: int, q2k_idx: Tensor, q2k_num: Tensor) -> None: ...

    def compact(self, block_map: Tensor, q2k_idx: Tensor, q2k_num: Tensor) -> None: ...

    def forward(
        self, problem: Problem, operands: Operands, keep_out_s: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]: ...

    def backward(
        self,
        problem: Problem,
        operands: Operands,
        out_s: Tensor,
        lse: Tensor,
        dout: Tensor,
        dlse: Tensor | None,
        need_dq: bool,
        need_dkv: bool,
    ) -> Gradients: ...


@dataclass(frozen=True)
class Entry:
    """One backend: what devices it was made for, and why it cannot run a call there (None: it can)."""

    name: str
    engine: str | None
    made_for: Callable[[torch.device], bool]
    why_not: Callable[[Problem, torch.device, torch.dtype], str | None]


@dataclass(frozen=True)
class Choice:
    """Which backend runs a call, and why each other one does not."""

    backend: str
    engine: str | None
    reasons: dict[str, str]

    def __str__(self) -> str:
        runs = self.backend if self.engine is None else f"{self.backend} (engine: {self.engine})"
        return "\n".join([f"runs: {runs}", *(f"not {name}: {reason}" for name, reason in self.reasons.items())])


def _triton_why_not(problem: Problem, device: torch.device, dtype: torch.dtype) -> str | None:
    if not _installed("triton"):
        return "the package triton is not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return f"Triton needs a CUDA device, and the tensors are on {device.type}"
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs, and this PyTorch is for AMD's"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_TRITON_CAPABILITY:
        needed = ".".join(map(str, OLDEST_TRITON_CAPABILITY))
        return f"Triton needs compute capability {needed}, and {device} has {'.'.join(map(str, capability))}"
    return None


@functools.cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


ENTRIES = (
    Entry("triton", "triton", lambda device: device.type == "cuda", _triton_why_not),
    Entry("torch", None, lambda device: True, lambda problem, device, dtype: None),
)
NAMES = ("auto", *(entry.name for entry in ENTRIES))


def check_name(source: str, name: str) -> str:
    """The name, if it is that of a backend or "auto"; ``source`` is the argument or variable that it came from."""
    if not isinstance(name, str):
        raise TypeError(f"{source}: expected a string, got {type(name).__name__}")
    if name not in NAMES:
        raise ValueError(f"{source}: expected one of {NAMES}, got {name!r}")
    return name


def choose(problem: Problem, device: torch.device, dtype: torch.dtype) -> Choice:
    """Takes the first backend that can run the call on this device, or the one asked for.

    Raises:
        RuntimeError: the backend asked for by name cannot run the call; the message says why.
    """
    source, name = _requested(problem)
    reasons: dict[str, str] = {}
    chosen = None
    for entry in ENTRIES:
        reason = entry.why_not(problem, device, dtype)
        if reason is not None:
            reasons[entry.name] = reason
        elif name == "auto" and not entry.made_for(device):
            reasons[entry.name] = f"runs on {device.type} only when asked for by name"
        elif chosen is not None:
            reasons[entry.name] = f"slower than {chosen.name}"
        elif name in ("auto", entry.name):
            chosen = entry
        else:
            reasons[entry.name] = f"{name} was asked for"
    if chosen is None:
        raise RuntimeError(f"{source}={name!r} cannot run this call: {reasons[name]}")
    return Choice(chosen.name, chosen.engine, reasons)


def backend_for(problem: Problem, device: torch.device, dtype: torch.dtype) -> Backend:
    """The chosen backend's module. Each distinct choice is logged once."""
    choice = choose(problem, device, dtype)
    _log_once(choice, problem, device)
    return cast(Backend, importlib.import_module(f"vsa_jit.backends.{choice.backend}"))


def _requested(problem: Problem) -> tuple[str, str]:
    """The backend asked for, or "auto", and where that was said."""
    if problem.backend != "auto":
        return "backend", problem.backend
    return ENVIRONMENT_VARIABLE, check_name(ENVIRONMENT_VARIABLE, os.environ.get(ENVIRONMENT_VARIABLE) or "auto")


def _log_once(choice: Choice, problem: Problem, device: torch.device) -> None:
    key = (str(device), choice.backend, *choice.reasons.values())
    if key in _logged:
        return
    _logged.add(key)
    faster = ENTRIES[: [entry.name for entry in ENTRIES].index(choice.backend)]
    missed = _requested(problem)[1] == "auto" and any(entry.made_for(device) for entry in faster)
    reasons = "; ".join(f"not {entry.name}: {choice.reasons[entry.name]}" for entry in faster)
    _logger.log(
        logging.WARNING if missed else logging.INFO,
        "backend %s runs on %s%s",
        choice.backend,
        device,
        f" ({reasons})" if reasons else "",
    )
