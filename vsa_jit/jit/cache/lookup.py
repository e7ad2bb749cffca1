"""The entry of a kernel: found in the cache, or compiled into it."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from pathlib import Path

from vsa_jit.jit.cache.entry import BadEntry, Entry, Recipe
from vsa_jit.jit.cache.location import open_store, private_store, stores, warn_not_kept
from vsa_jit.jit.errors import CompileError

_logger = logging.getLogger("vsa_jit")


def find(recipe: Recipe) -> Entry | None:
    """The entry of a recipe, checked. A bad one counts as none, and is dropped when its key is compiled."""
    for store in stores():
        try:
            entry = store.load(recipe)
        except BadEntry as bad:
            if not store.writable:
                _warn_bad(str(store.root / recipe.arch / recipe.key), str(bad))
            continue
        if entry is not None:
            return entry
    return None


def find_or_build(recipe: Recipe, make: Callable[[Path], bytes], cancelled: threading.Event) -> Entry:
    """The entry of a recipe, compiled if need be, in the user's folder or, where that fails, in a private one.

    Raises:
        CompileError: it does not compile, or can be written nowhere.
    """
    entry = find(recipe)
    if entry is not None:
        return entry
    store = open_store()
    if store.writable:
        try:
            return store.build(recipe, make, cancelled)
        except OSError as error:
            if cancelled.is_set():
                raise CompileError(recipe.label, "cancelled") from None
            # Another host that locks do not reach may have been faster.
            entry = find(recipe)
            if entry is not None:
                return entry
            warn_not_kept(f"{error.strerror}: {store.root}")
    else:
        warn_not_kept(f"{store.root} cannot be written to")
    try:
        return private_store().build(recipe, make, cancelled)
    except OSError as error:
        raise CompileError(recipe.label, f"{error.strerror}: {error.filename}") from None


@functools.cache
def _warn_bad(folder: str, bad: str) -> None:
    _logger.warning("the compiled kernel at %s is not used: %s", folder, bad)
