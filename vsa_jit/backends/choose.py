"""The backends, fastest first, and the one chooser that gives a reason.

A backend is an entry of ``ENTRIES`` and a module with the functions of ``Backend``, imported when a call first runs on
it: a machine without its packages never needs them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from vsa_jit.checks import check_choice
from vsa_jit.jit.errors import JitError, NotWarmError, SettingError
from vsa_jit.problem import Gradients, Operands, Problem, Side

ENVIRONMENT_VARIABLE = "VSA_JIT_BACKEND"
_MOST_CHOSEN = 4096
OLDEST_TRITON_CAPABILITY = (8, 0)
HOPPER_CAPABILITY = (9, 0)

_logger = logging.getLogger("vsa_jit")
_logged: set[tuple[str, ...]] = set()
# What turned out not to run in this process, by backend, device, dtype and head dimension, and why.
_failed: dict[tuple[str, torch.device, torch.dtype, int], str] = {}
# What was chosen for a call, so that a call like it asks nothing again.
_chosen: dict[tuple, Backend] = {}


class Backend(Protocol):
    """What a backend's module offers. ``vsa_jit.ops`` has one operator for each, and says there what it computes."""

    def block_means(
        self, problem: Problem, q: Tensor, k: Tensor, v: Tensor | None, q_sizes: Tensor | None, kv_sizes: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]: ...

    def block_mean_backward(self, side: Side, dmean: Tensor, x: Tensor, sizes: Tensor | None) -> Tensor: ...

    def matmul(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        """a · b of fp32 matrices, [R, M, K] and [R, K, N] of any strides, as exact as fp32 arithmetic.

        Args:
            out: where the result goes, contiguous; a new tensor if None.
        """
        ...

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

    @property
    def invert(self) -> Callable[[Problem, Tensor, Tensor], object] | None:
        """The inversion of the map that ``backward`` does for dk and dv; None where it does all in one pass."""
        ...


@dataclass(frozen=True)
class Entry:
    """One backend.

    Attributes:
        module: where its functions are.
        engine: what compiles its kernels for a call that it can run.
        made_for: whether it was made for a device.
        why_not: why it cannot run a call on a device with tensors of a dtype, or None; the tensors are those at hand.
        prepare: makes its kernels ready for such a call, or None where there is nothing to make ready.
    """

    name: str
    module: str
    engine: Callable[[Problem, torch.dtype], str | None]
    made_for: Callable[[torch.device], bool]
    why_not: Callable[[Problem, torch.device, torch.dtype, Sequence[Tensor]], str | None]
    prepare: Callable[[Problem, torch.device, torch.dtype], None] | None = None


@dataclass(frozen=True, repr=False)
class Choice:
    """Which backend runs a call, and why each other one does not; it shows as it prints."""

    backend: str
    engine: str | None
    reasons: dict[str, str]

    def __str__(self) -> str:
        runs = self.backend if self.engine is None else f"{self.backend} (engine: {self.engine})"
        return "\n".join([f"runs: {runs}", *(f"not {name}: {reason}" for name, reason in self.reasons.items())])

    __repr__ = __str__


def _is_hopper(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) == HOPPER_CAPABILITY


def _sm90_why_not(problem: Problem, device: torch.device, dtype: torch.dtype, tensors: Sequence[Tensor]) -> str | None:
    if device.type != "cuda":
        return f"the kernels are for Hopper GPUs, and the tensors are on {device.type}"
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs, and this PyTorch is for AMD's"
    capability = torch.cuda.get_device_capability(device)
    if capability != HOPPER_CAPABILITY:
        needed = _dotted(HOPPER_CAPABILITY)
        return f"the kernels are for compute capability {needed}, and {device} has {_dotted(capability)}"
    reason = _triton_why_not(problem, device, dtype, tensors)
    if reason is not None:
        return f"Triton runs what has no Hopper kernel yet, and {reason}"
    from vsa_jit.backends.sm90 import support

    return support.why_not(problem, dtype, tensors)


def _sm90_engine(problem: Problem, dtype: torch.dtype) -> str:
    from vsa_jit.backends.sm90 import support

    return support.engine_of(problem, dtype)


def _sm90_prepare(problem: Problem, device: torch.device, dtype: torch.dtype) -> None:
    from vsa_jit.backends.sm90 import support

    support.prepare(problem, device, dtype)


def _triton_why_not(
    problem: Problem, device: torch.device, dtype: torch.dtype, tensors: Sequence[Tensor]
) -> str | None:
    if not _installed("triton"):
        return "the package triton is not installed (pip install triton)"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return f"Triton needs a CUDA device, and the tensors are on {device.type}"
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs, and this PyTorch is for AMD's"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_TRITON_CAPABILITY:
        needed = _dotted(OLDEST_TRITON_CAPABILITY)
        return f"Triton needs compute capability {needed}, and {device} has {_dotted(capability)}"
    return None


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


@functools.cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


ENTRIES = (
    Entry("sm90", "vsa_jit.backends.sm90.backend", _sm90_engine, _is_hopper, _sm90_why_not, _sm90_prepare),
    Entry(
        "triton",
        "vsa_jit.backends.triton",
        lambda problem, dtype: "triton",
        lambda device: device.type == "cuda",
        _triton_why_not,
    ),
    Entry(
        "torch",
        "vsa_jit.backends.torch",
        lambda problem, dtype: None,
        lambda device: True,
        lambda problem, device, dtype, tensors: None,
    ),
)
NAMES = ("auto", *(entry.name for entry in ENTRIES))


def choose(
    problem: Problem, backend: str, device: torch.device, dtype: torch.dtype, tensors: Sequence[Tensor] = ()
) -> Choice:
    """Takes the first backend that can run the call on this device, or the one asked for.

    Args:
        backend: the name of the one asked for, or "auto".
        tensors: those of q, k and v that are at hand; a backend may not be able to read them where they lie.

    Raises:
        RuntimeError: the backend asked for by name cannot run the call; the message says why.
        SettingError, ValueError: an environment variable has a wrong value.
    """
    source, name = _requested(backend)
    reasons: dict[str, str] = {}
    chosen = engine = None
    for entry in ENTRIES:
        # Who asks for a backend by name gets its own error each time.
        failed = _failed.get((entry.name, device, dtype, problem.head_dim)) if name == "auto" else None
        reason = failed or entry.why_not(problem, device, dtype, tensors)
        if reason is not None:
            reasons[entry.name] = reason
        elif name == "auto" and not entry.made_for(device):
            reasons[entry.name] = f"runs on {device.type} only when asked for by name"
        elif chosen is not None:
            reasons[entry.name] = f"slower than {chosen.name}"
        elif name in ("auto", entry.name):
            try:
                engine = entry.engine(problem, dtype)
                chosen = entry
            except SettingError:
                raise
            except (JitError, OSError) as error:
                reasons[entry.name] = str(error)
        else:
            reasons[entry.name] = f"{name} was asked for"
    if chosen is None:
        raise RuntimeError(f"{source}={name!r} cannot run this call: {reasons[name]}")
    return Choice(chosen.name, engine, reasons)


def backend_for(problem: Problem, backend: str, *tensors: Tensor) -> Backend:
    """The module of the backend chosen for a call with these tensors, its kernels ready. Each choice is logged once.

    Raises:
        JitError: the backend was asked for by name, and its kernels do not compile or load. Else the next one runs.
        NotWarmError: its kernels are not loaded, and a CUDA graph is being captured.
    """
    device, dtype = tensors[0].device, tensors[0].dtype
    # All that a choice depends on: addresses matter to a backend by their alignment, and the last variable on a CPU
    # only. A variable takes as long to look up as two tensors.
    variable = os.environ.get
    interpreted = variable("TRITON_INTERPRET") if tensors[0].is_cpu else None
    places: tuple = ()
    for x in tensors:
        places = (places, x.stride(), x.data_ptr() % 16)
    asked = (backend, variable(ENVIRONMENT_VARIABLE), variable("VSA_JIT_ENGINE"), interpreted)
    key = (problem, device, dtype, places, *asked)
    chosen = _chosen.get(key)
    if chosen is None:
        if len(_chosen) >= _MOST_CHOSEN:
            _chosen.clear()
        chosen = _chosen[key] = _choose_and_prepare(problem, backend, device, dtype, tensors)
    return chosen


def _choose_and_prepare(
    problem: Problem, backend: str, device: torch.device, dtype: torch.dtype, tensors: Sequence[Tensor]
) -> Backend:
    choice = choose(problem, backend, device, dtype, tensors)
    entry = next(entry for entry in ENTRIES if entry.name == choice.backend)
    if entry.prepare is not None:
        try:
            entry.prepare(problem, device, dtype)
        except NotWarmError:
            raise
        except JitError as error:
            if _requested(backend)[1] != "auto":
                raise
            _failed[entry.name, device, dtype, problem.head_dim] = str(error)
            return _choose_and_prepare(problem, backend, device, dtype, tensors)
    _log_once(choice, backend, device)
    return cast(Backend, importlib.import_module(entry.module))


def _requested(backend: str) -> tuple[str, str]:
    """The backend asked for, or "auto", and where that was said."""
    if backend != "auto":
        return "backend", backend
    name = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    return ENVIRONMENT_VARIABLE, check_choice(ENVIRONMENT_VARIABLE, name, NAMES)


def _log_once(choice: Choice, backend: str, device: torch.device) -> None:
    key = (str(device), choice.backend, *choice.reasons.values())
    if key in _logged:
        return
    _logged.add(key)
    faster = ENTRIES[: [entry.name for entry in ENTRIES].index(choice.backend)]
    missed = _requested(backend)[1] == "auto" and any(entry.made_for(device) for entry in faster)
    reasons = "; ".join(f"not {entry.name}: {choice.reasons[entry.name]}" for entry in faster)
    _logger.log(
        logging.WARNING if missed else logging.INFO,
        "backend %s runs on %s%s",
        choice.backend,
        device,
        f" ({reasons})" if reasons else "",
    )
