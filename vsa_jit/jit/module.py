"""Kernels that are loaded in this process, for each device."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch

from vsa_jit.jit import engines
from vsa_jit.jit.compile import entries_of
from vsa_jit.jit.driver import Launcher, make_context_current
from vsa_jit.jit.errors import JitError, LoadError, NotWarmError
from vsa_jit.jit.kernel import Kernel
from vsa_jit.jit.toolchain import CAPABILITIES


class _Loaded(NamedTuple):
    launcher: Launcher
    engine: str


_loaded: dict[tuple[Kernel, int], _Loaded] = {}
_loading = threading.Lock()


def launcher(kernel: Kernel, device: int) -> Launcher:
    """The launcher of a kernel that ``load`` has loaded."""
    return _loaded[kernel, device].launcher


def loaded_engine(kernels: Sequence[Kernel], device: int) -> str | None:
    """The engine whose code of these kernels is loaded; it stays until the process ends. None: some are not loaded."""
    if not all((kernel, device) in _loaded for kernel in kernels):
        return None
    return _loaded[kernels[0], device].engine


def load(kernels: Sequence[Kernel], device: int, engine: str) -> None:
    """Makes kernels ready to be launched on a device, compiling together those that the cache does not hold.

    Args:
        engine: the name that ``engines.choose`` gave. Another choice here could differ from it, because what the cache
            holds by now decides too.

    Raises:
        CompileError: one does not compile.
        LoadError: one does not load, or the system has no thread or memory left to compile it.
        NotWarmError: one is not loaded, and a CUDA graph is being captured.
        Unavailable: the engine's compiler is missing.
    """
    if all((kernel, device) in _loaded for kernel in kernels):
        return
    with _loading:
        missing = [kernel for kernel in kernels if (kernel, device) not in _loaded]
        if missing and torch.cuda.is_current_stream_capturing():
            raise NotWarmError(
                f"{', '.join(kernel.label for kernel in missing)}: not loaded, and a CUDA graph is being captured; run "
                "warmup first: vsa_jit.warmup(), or the same call once before the capture"
            )
        if missing:
            _load(missing, device, engine)


def _load(kernels: Sequence[Kernel], device: int, engine_name: str) -> None:
    arch = CAPABILITIES[torch.cuda.get_device_capability(device)]
    target = torch.cuda.get_device_name(device)
    try:
        engine = engines.named(engine_name)
        entries = entries_of(kernels, arch, engine, target=target)
        if not all(entry.artefact.exists() for entry in entries):
            # Somebody cleared the cache this very moment.
            entries = entries_of(kernels, arch, engine, target=target)
        with torch.cuda.device(device):
            make_context_current(device)
            for kernel, entry in zip(kernels, entries, strict=True):
                function = engine.function(entry, kernel)
                launcher = Launcher(kernel, function, device)
                _loaded[kernel, device] = _Loaded(launcher, engine_name)
    except JitError:
        raise
    except Exception as error:  # of CuPy, of the system's loader, of the driver, of a system without threads
        labels = ", ".join(kernel.label for kernel in kernels)
        raise LoadError(f"{labels} could not be loaded: {type(error).__name__}: {error}") from error
