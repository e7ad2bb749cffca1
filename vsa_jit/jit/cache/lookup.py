"""The entry of a kernel: found in the cache, or compiled into it."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from pathlib import Path

from vsa_jit.jit.cache.entry import BadEntry, CompileSpec, Entry
from vsa_jit.jit.cache.location import caches, open_cache, private_cache, warn_not_persistent
from vsa_jit.jit.errors import CompileError

_logger = logging.getLogger("vsa_jit")


def find(spec: CompileSpec) -> Entry | None:
    """The entry of a spec, checked. A bad one counts as none, and is dropped when its key is compiled."""
    for cache in caches():
        try:
            entry = cache.load(spec)
        except BadEntry as bad:
            if not cache.writable:
                _warn_bad(str(cache.root / spec.arch / spec.key), str(bad))
            continue
        if entry is not None:
            return entry
    return None


def find_or_build(spec: CompileSpec, make: Callable[[Path], bytes], cancelled: threading.Event) -> Entry:
    """The entry of a spec, compiled if need be, in the user's folder or, where that fails, in a private one.

    Raises:
        CompileError: it does not compile, or can be written nowhere.
    """
    entry = find(spec)
    if entry is not None:
        return entry
    cache = open_cache()
    if cache.writable:
        try:
            return cache.build(spec, make, cancelled)
        except OSError as error:
            if cancelled.is_set():
                raise CompileError(spec.label, "cancelled") from None
            # Another host that locks do not reach may have been faster.
            entry = find(spec)
            if entry is not None:
                return entry
            warn_not_persistent(f"{error.strerror}: {cache.root}")
    else:
        warn_not_persistent(f"{cache.root} cannot be written to")
    try:
        return private_cache().build(spec, make, cancelled)
    except OSError as error:
        raise CompileError(spec.label, f"{error.strerror}: {error.filename}") from None


@functools.cache
def _warn_bad(folder: str, bad: str) -> None:
    _logger.warning("the compiled kernel at %s is not used: %s", folder, bad)
