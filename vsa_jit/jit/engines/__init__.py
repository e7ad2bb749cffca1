"""The two engines that compile a kernel, and the choice between them."""

from __future__ import annotations

import os
from collections.abc import Iterable

from vsa_jit.jit.cache.lookup import find
from vsa_jit.jit.engines.base import Engine
from vsa_jit.jit.engines.nvcc import NvccEngine
from vsa_jit.jit.engines.nvrtc import NvrtcEngine
from vsa_jit.jit.errors import Unavailable
from vsa_jit.jit.kernel import Kernel

ENVIRONMENT_VARIABLE = "VSA_JIT_ENGINE"
ENGINES: tuple[Engine, ...] = (NvrtcEngine(), NvccEngine())
NAMES = ("auto", *(engine.name for engine in ENGINES))


def requested() -> str:
    """The engine that the environment asks for, or "auto".

    Raises:
        ValueError: VSA_JIT_ENGINE names no engine; the message says what it may be.
    """
    name = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    if name not in NAMES:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}: expected one of {NAMES}, got {name!r}")
    return name


def named(name: str) -> Engine:
    """The engine of a name that ``choose`` gave."""
    return {engine.name: engine for engine in ENGINES}[name]


def why_not(engine: Engine) -> Unavailable | None:
    """What keeps an engine from compiling. None: nothing does."""
    try:
        engine.check()
    except Unavailable as error:
        return error
    return None


def choose(kernels: Iterable[Kernel], arch: str, name: str = "auto") -> Engine:
    """The engine asked for, or the first that has all kernels in the cache, or the first that can compile them.

    An engine whose compiler is missing is not taken, even if the cache has its kernels.

    Raises:
        Unavailable: there is none; the reason says why for each.
    """
    if name == "auto":
        name = requested()
    kernels = list(kernels)
    reasons: list[Unavailable] = []
    first: Engine | None = None
    for engine in ENGINES:
        if name not in ("auto", engine.name):
            continue
        reason = why_not(engine)
        if reason is not None:
            reasons.append(Unavailable(f"{engine.name}: {reason.reason}", reason.fix))
        elif all(find(engine.spec(kernel, arch)) for kernel in kernels):
            return engine
        else:
            first = first or engine
    if first is None:
        raise Unavailable("no compiler: " + "; ".join(map(str, reasons)))
    return first
