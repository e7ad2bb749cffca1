"""The one chooser among the backends, which gives a reason, and the functions that run a call's operators."""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from vsa_jit.backends.base import STAGES, Backend, BackendSpec
from vsa_jit.checks import check_choice
from vsa_jit.jit.errors import JitError, NotWarmError, SettingError
from vsa_jit.problem import Problem

ENVIRONMENT_VARIABLE = "VSA_JIT_BACKEND"
# Fastest first.
BACKENDS = ("sm90", "triton", "torch")
NAMES = ("auto", *BACKENDS)
_MOST_CHOSEN = 4096

_logger = logging.getLogger("vsa_jit")
_logged: set[tuple[str, ...]] = set()
# What turned out not to run in this process, by what its kernels depend on, and why.
_failed: dict[tuple, str] = {}
# What was chosen for a call, operator by operator, so that a call like it asks nothing again.
_chosen: dict[tuple, Mapping[str, Backend]] = {}


@functools.cache
def specs() -> tuple[BackendSpec, ...]:
    """The backends in the order of ``BACKENDS``. Not at import: the compiler's modules take as long as all others."""
    return tuple(importlib.import_module(f"vsa_jit.backends.{name}.support").SPEC for name in BACKENDS)


@dataclass(frozen=True, repr=False)
class Choice:
    """Which backend runs a call, and why each other one does not; it shows as it prints.

    Attributes:
        engine: what compiles the backend's kernels, or None.
        reasons: why not, of each other backend.
        runners: the backend that runs each operator of the call: not always the one chosen, which may have kernels for
            some operators only.
    """

    backend: str
    engine: str | None
    reasons: dict[str, str]
    runners: dict[str, str]

    def __str__(self) -> str:
        runs = self.backend if self.engine is None else f"{self.backend} (engine: {self.engine})"
        for stage, operators in STAGES.items():
            runners = dict.fromkeys(self.runners[operator] for operator in operators)
            if list(runners) != [self.backend]:
                runs += f"; {stage}: {', '.join(runners)}"
        return "\n".join([f"runs: {runs}", *(f"not {name}: {reason}" for name, reason in self.reasons.items())])

    __repr__ = __str__


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
    for spec in specs():
        # Who asks for a backend by name gets its own error each time.
        failed = _failed.get(_kind_of(spec, problem, device, dtype)) if name == "auto" else None
        reason = failed or spec.why_not_on(device) or spec.why_not(problem, dtype, tensors)
        if reason is not None:
            reasons[spec.name] = reason
        elif name == "auto" and not spec.is_native_on(device):
            reasons[spec.name] = f"runs on {device.type} only when asked for by name"
        elif chosen is not None:
            reasons[spec.name] = f"slower than {chosen.name}"
        elif name in ("auto", spec.name):
            try:
                engine = spec.engine_of(problem, device, dtype)
                chosen = spec
            except SettingError:
                raise
            except (JitError, OSError) as error:
                reasons[spec.name] = str(error)
        else:
            reasons[spec.name] = f"{name} was asked for"
    if chosen is None:
        raise _refusal(source, name, reasons[name])
    runners = chosen.runners if chosen.runners_of is None else chosen.runners_of(problem)
    return Choice(chosen.name, engine, reasons, dict(runners))


def backend_for(operator: str, problem: Problem, backend: str, *tensors: Tensor) -> Backend:
    """The functions that run one operator, see ``backends_for``."""
    return backends_for(problem, backend, *tensors)[operator]


def backends_for(problem: Problem, backend: str, *tensors: Tensor) -> Mapping[str, Backend]:
    """The functions that run each operator of a call with these tensors; the kernels of its backend are ready.

    Each choice is logged once.

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
    return _chosen.get(key) or _remember(key, _choose_and_prepare(problem, backend, device, dtype, tensors))


def selection_backend_for(operator: str, backend: str, device: torch.device) -> Backend:
    """The functions that run an operator which sees no tokens, but the means of blocks or a map of them.

    Whether a backend can read the tokens, and in which dtype, is then no question: the one asked for, or the first that
    was made for the device, says who runs the operator.

    Raises:
        RuntimeError: the backend asked for by name runs nothing on the device.
    """
    variable = os.environ.get
    interpreted = variable("TRITON_INTERPRET") if device.type == "cpu" else None
    key = (device, backend, variable(ENVIRONMENT_VARIABLE), interpreted)
    chosen = _chosen.get(key)
    if chosen is None:
        chosen = _remember(key, _functions_of(_spec_on(device, backend).runners))
    return chosen[operator]


def _remember(key: tuple, chosen: Mapping[str, Backend]) -> Mapping[str, Backend]:
    if len(_chosen) >= _MOST_CHOSEN:
        _chosen.clear()
    _chosen[key] = chosen
    return chosen


def _choose_and_prepare(
    problem: Problem, backend: str, device: torch.device, dtype: torch.dtype, tensors: Sequence[Tensor]
) -> Mapping[str, Backend]:
    choice = choose(problem, backend, device, dtype, tensors)
    spec = _spec_named(choice.backend)
    if spec.prepare is not None and choice.engine is not None:
        try:
            spec.prepare(problem, device, dtype, choice.engine)
        except NotWarmError:
            raise
        except JitError as error:
            if _requested(backend)[1] != "auto":
                raise
            _failed[_kind_of(spec, problem, device, dtype)] = str(error)
            return _choose_and_prepare(problem, backend, device, dtype, tensors)
    _log_once(choice, backend, device)
    return _functions_of(choice.runners)


def _functions_of(runners: Mapping[str, str]) -> dict[str, Backend]:
    """The functions that run each operator."""
    return {
        operator: cast(Backend, importlib.import_module(f"vsa_jit.backends.{runner}.launches"))
        for operator, runner in runners.items()
    }


def _spec_on(device: torch.device, backend: str) -> BackendSpec:
    """Of the backend asked for or, of those that run on a device, the first that was made for it."""
    source, name = _requested(backend)
    if name == "auto":
        return next(spec for spec in specs() if spec.is_native_on(device) and spec.why_not_on(device) is None)
    spec = _spec_named(name)
    reason = spec.why_not_on(device)
    if reason is not None:
        raise _refusal(source, name, reason)
    return spec


def _spec_named(name: str) -> BackendSpec:
    return next(spec for spec in specs() if spec.name == name)


def _kind_of(spec: BackendSpec, problem: Problem, device: torch.device, dtype: torch.dtype) -> tuple:
    """What calls have in common that run the same kernels."""
    return spec.name, device, dtype, problem.head_dim, problem.block


def _requested(backend: str) -> tuple[str, str]:
    """The backend asked for, or "auto", and where that was said."""
    if backend != "auto":
        return "backend", backend
    name = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    return ENVIRONMENT_VARIABLE, check_choice(ENVIRONMENT_VARIABLE, name, NAMES)


def _refusal(source: str, name: str, reason: str) -> RuntimeError:
    return RuntimeError(f"{source}={name!r} cannot run this call: {reason}")


def _log_once(choice: Choice, backend: str, device: torch.device) -> None:
    key = (str(device), choice.backend, *choice.reasons.values())
    if key in _logged:
        return
    _logged.add(key)
    faster = specs()[: BACKENDS.index(choice.backend)]
    missed = _requested(backend)[1] == "auto" and any(spec.is_native_on(device) for spec in faster)
    reasons = "; ".join(f"not {spec.name}: {choice.reasons[spec.name]}" for spec in faster)
    _logger.log(
        logging.WARNING if missed else logging.INFO,
        "backend %s runs on %s%s",
        choice.backend,
        device,
        f" ({reasons})" if reasons else "",
    )
