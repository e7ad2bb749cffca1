"""Where compiled kernels are kept: in the user's folder or, where that cannot be used, until the process ends."""

from __future__ import annotations

import atexit
import errno
import functools
import logging
import os
import tempfile
from pathlib import Path

from vsa_jit.jit.cache.permissions import exists, why_replaceable, why_unsafe
from vsa_jit.jit.cache.store import KernelCache, remove_tree
from vsa_jit.jit.errors import CacheError, SettingError

ENVIRONMENT_VARIABLE = "VSA_JIT_CACHE_DIR"
# These mean that the variable names no possible folder: an error of the user. Other errors (of a file server, say) are
# the machine's state, and kernels are then kept in a private folder.
_WRONG_PATH = (errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG)

_logger = logging.getLogger("vsa_jit")
# By process id: a forked child makes its own folder, because that of its parent ends with the parent.
_private_caches: dict[int, KernelCache] = {}


class _NoHomeError(Exception):
    """Why there is no folder of the user's."""


def user_folder() -> Path:
    """Where this user's kernels are kept.

    Raises:
        SettingError: VSA_JIT_CACHE_DIR is not an absolute path; the message says what it is.
        _NoHomeError: there is no home folder.
    """
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if named:
        if not os.path.isabs(named):
            raise SettingError(f"{ENVIRONMENT_VARIABLE}: expected an absolute path of a folder, got {named!r}")
        return Path(named)
    xdg = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification ignores paths that are not absolute.
    if xdg and os.path.isabs(xdg):
        return Path(xdg) / "vsa_jit"
    try:
        home = Path.home()
    except RuntimeError:
        raise _NoHomeError("there is no home folder") from None
    # Unlike pathlib's, this one answers for a folder behind what cannot be entered.
    if not home.is_absolute() or not os.path.isdir(home):
        raise _NoHomeError(f"the home folder {home} does not exist or cannot be reached")
    return home / ".cache" / "vsa_jit"


def open_cache() -> KernelCache:
    """The user's cache, or, where that cannot be used, a private one that ends with the process.

    Raises:
        SettingError: VSA_JIT_CACHE_DIR names what cannot be a folder, or one that somebody else could write to.
        CacheError: nowhere can anything be written.
    """
    variables = (ENVIRONMENT_VARIABLE, "XDG_CACHE_HOME", "HOME")
    return _open_cache(os.getpid(), *map(os.environ.get, variables))


# Everything that the answer depends on is an argument: a change of a variable, or a fork, makes it look again.
@functools.cache
def _open_cache(pid: int, named: str | None, xdg: str | None, home: str | None) -> KernelCache:
    try:
        folder = user_folder()
    except _NoHomeError as error:
        return _fall_back(str(error))
    try:
        unsafe = why_unsafe(folder) if os.path.lexists(folder) else None
        # A link on the way is followed once, here.
        place = folder.resolve()
        existing = next(path for path in (place, *place.parents) if exists(path))
        if unsafe is None and not existing.is_dir():
            unsafe = f"{existing} is not a folder"
        unsafe = unsafe or why_replaceable(place)
    except (OSError, RuntimeError) as error:
        unsafe = f"{folder} cannot be reached: {error}"
        # pathlib says of a loop of links that it is a RuntimeError.
        if getattr(error, "errno", errno.ELOOP) not in _WRONG_PATH:
            return _fall_back(unsafe)
    if unsafe is None:
        return KernelCache(place, writable=os.access(existing, os.W_OK | os.X_OK), persistent=True)
    if named:
        raise SettingError(f"{ENVIRONMENT_VARIABLE}: expected a folder that nobody else can write to, but {unsafe}")
    return _fall_back(unsafe)


def private_cache() -> KernelCache:
    """A cache that ends with this process.

    Raises:
        CacheError: nowhere can anything be written.
    """
    pid = os.getpid()
    if pid in _private_caches:
        return _private_caches[pid]
    try:
        folder = Path(tempfile.mkdtemp(prefix="vsa_jit-"))
    except OSError as error:
        raise CacheError(f"no folder for compiled kernels: {error}") from None

    def remove() -> None:
        # Not in a forked child; and what an error has named stays.
        if os.getpid() == pid and not any(folder.glob("*/failed/*")):
            remove_tree(folder)

    atexit.register(remove)
    return _private_caches.setdefault(pid, KernelCache(folder, writable=True, persistent=False))


def caches() -> list[KernelCache]:
    """Where compiled kernels are looked for: the user's cache, and the private one if there is one."""
    cache = open_cache()
    # A private folder is made only when something must be written to it.
    private = _private_caches.get(os.getpid(), cache)
    return [cache] if private is cache else [cache, private]


def _fall_back(reason: str) -> KernelCache:
    warn_not_persistent(reason)
    return private_cache()


@functools.cache
def warn_not_persistent(reason: str) -> None:
    _logger.warning(
        "compiled kernels are not kept for the next process: %s (%s names a folder to keep them in)",
        reason,
        ENVIRONMENT_VARIABLE,
    )
