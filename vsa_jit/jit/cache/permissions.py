"""Checks that nobody else can write to a file or folder, because code from there is run."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_OVERFLOW_USER = 65534


def why_unsafe(path: Path) -> str | None:
    """Why code from this file or folder must not be run: somebody else could have written it. None: nobody could."""
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        return f"{path} is a symbolic link"
    if status.st_uid not in (os.getuid(), 0):
        return f"{path} belongs to user {status.st_uid}"
    if status.st_mode & 0o022:
        return f"{path} can be written to by others (mode {stat.S_IMODE(status.st_mode):o})"
    return None


def why_replaceable(folder: Path) -> str | None:
    """Why somebody else could put another folder in the place of this one, which may not be there yet."""
    trusted = {os.getuid(), 0} | ({_OVERFLOW_USER} if _in_user_namespace() else set())
    # By convention a group of the user's own number is the user's alone.
    own_group = os.getgid() if os.getgid() == os.getuid() else None
    for parent in folder.parents:
        if not exists(parent):
            continue
        status = os.stat(parent)
        if status.st_uid not in trusted:
            return f"{parent} belongs to user {status.st_uid}"
        by_group = status.st_mode & 0o020 and status.st_gid != own_group
        if not status.st_mode & stat.S_ISVTX and (status.st_mode & 0o002 or by_group):
            return f"{parent} can be written to by others (mode {stat.S_IMODE(status.st_mode):o})"
    return None


def make_folder(folder: Path) -> None:
    """Makes a folder, with its parents, that others can read and only this user can write to, whatever the umask.

    Raises:
        OSError: it cannot be made, or it is there and somebody else could write to it.
    """
    for missing in reversed([parent for parent in folder.parents if not exists(parent)]):
        missing.mkdir(mode=0o755, exist_ok=True)
    folder.mkdir(mode=0o755, exist_ok=True)
    unsafe = why_unsafe(folder)
    if unsafe is not None:
        raise PermissionError(errno.EPERM, unsafe, str(folder))


def exists(path: Path) -> bool:
    """Whether something is there.

    Raises:
        OSError: it cannot be told; pathlib's own answers differ from one Python to the next.
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _in_user_namespace() -> bool:
    """Whether what root owns outside may seem to belong to the overflow user here."""
    try:
        return Path("/proc/self/uid_map").read_text().split() != ["0", "0", "4294967295"]
    except OSError:
        return False
