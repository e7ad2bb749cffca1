"""The lock of a key, which one process at a time compiles."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

# Longer than a compile may take, so that a longer wait means that the holder is suspended.
LOCK_LIMIT_S = 360.0
LOCK_POLL_S = 0.02


@contextlib.contextmanager
def locked(path: Path, cancelled: threading.Event) -> Iterator[None]:
    """Holds an flock, which the operating system drops when the process ends. The file is never removed.

    Raises:
        OSError: the file system has no locks, the lock is held for longer than ``LOCK_LIMIT_S``, or the wait was
            cancelled.
    """
    # Imported here, because the other backends also run on systems that have no fcntl.
    import fcntl

    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        deadline = time.monotonic() + LOCK_LIMIT_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if cancelled.is_set():
                    raise OSError(errno.ECANCELED, "cancelled", str(path)) from None
                if time.monotonic() > deadline:
                    reason = "another process holds the lock and does not go on"
                    raise OSError(errno.ENOLCK, reason, str(path)) from None
                time.sleep(LOCK_POLL_S)
        try:
            yield
        finally:
            # Closing would not unlock it where a child that another thread forked meanwhile has the file open too.
            fcntl.flock(file, fcntl.LOCK_UN)
    finally:
        os.close(file)


def is_locked(path: Path) -> bool:
    """Whether some process holds a lock now."""
    cancelled = threading.Event()
    cancelled.set()
    try:
        with locked(path, cancelled):
            return False
    except FileNotFoundError:
        return False
    except OSError:
        return True
