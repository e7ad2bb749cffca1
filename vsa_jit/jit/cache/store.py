"""One folder of entries: reading them checked, compiling them in private folders, clearing them."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import platform
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from vsa_jit.jit.cache.entry import MANIFEST, BadEntry, CompileSpec, Entry, check_entry, manifest_of
from vsa_jit.jit.cache.lock import LOCK_LIMIT_S, is_locked, locked
from vsa_jit.jit.cache.permissions import make_folder, why_unsafe
from vsa_jit.jit.errors import CacheError, CompileError

_KEY_LENGTH = 64

_logger = logging.getLogger("vsa_jit")


class KernelCache:
    """A folder of entries that only this user, or root, can write to.

    Attributes:
        writable: whether new entries can be made in it.
        persistent: whether it outlives the process.
    """

    def __init__(self, root: Path, *, writable: bool, persistent: bool) -> None:
        self.root = root
        self.writable = writable
        self.persistent = persistent

    def load(self, spec: CompileSpec) -> Entry | None:
        """The checked entry of a spec, or None where there is none.

        Raises:
            BadEntry: there is one, and it fails its check.
        """
        folder = self.root / spec.arch / spec.key
        if not os.path.lexists(folder):
            return None
        return self._check(folder)

    def _check(self, folder: Path) -> Entry:
        try:
            for path in (folder.parent, folder, *folder.iterdir()):
                unsafe = why_unsafe(path)
                if unsafe is not None:
                    raise BadEntry(unsafe)
            manifest = (folder / MANIFEST).read_bytes()
            spec, size = check_entry(folder.name, manifest, lambda name: (folder / name).read_bytes())
        except OSError as error:
            raise BadEntry(f"{error.strerror}: {error.filename}") from None
        if spec.arch != folder.parent.name:
            raise BadEntry(f"it is for {spec.arch}")
        return Entry(folder, spec, size)

    def entries(self) -> Iterator[tuple[Path, Entry | BadEntry]]:
        """Every entry, or what is wrong with it."""
        for folder in sorted(self.root.glob("sm_*/*")):
            if _is_key(folder.name):
                try:
                    yield folder, self._check(folder)
                except BadEntry as error:
                    yield folder, error

    def build(self, spec: CompileSpec, make: Callable[[Path], bytes], cancelled: threading.Event) -> Entry:
        """Compiles an entry, unless another process has done so meanwhile.

        Args:
            make: compiles in the build folder that it is given, and returns the artefact.
            cancelled: ends the wait for another process.

        Raises:
            CompileError: ``make`` raised it; its files are kept in the folder ``failed``.
            OSError: this folder cannot be written.
        """
        arch_folder = self.root / spec.arch
        for folder in (self.root, arch_folder, arch_folder / "locks", arch_folder / "build"):
            make_folder(folder)
        with locked(arch_folder / "locks" / f"{spec.key}.lock", cancelled):
            try:
                entry = self.load(spec)
            except BadEntry as bad:
                self._drop(arch_folder / spec.key, bad)
                entry = None
            return entry or self._compile(spec, make)

    def _compile(self, spec: CompileSpec, make: Callable[[Path], bytes]) -> Entry:
        arch_folder = self.root / spec.arch
        for abandoned in (arch_folder / "build").glob(f"{spec.key}-*"):
            if _is_abandoned(abandoned):
                remove_tree(abandoned)
        build_folder = _make_build_folder(arch_folder, spec.key)
        try:
            artefact = make(build_folder)
            return self.publish(spec, manifest_of(spec, artefact).encode(), artefact, build_folder)
        except CompileError as error:
            if error.folder is None:
                raise
            make_folder(arch_folder / "failed")
            failed = arch_folder / "failed" / spec.key
            remove_tree(failed)
            os.rename(build_folder, failed)
            raise error.moved_to(failed) from None
        finally:
            remove_tree(build_folder)

    def publish(self, spec: CompileSpec, manifest: bytes, artefact: bytes, build_folder: Path) -> Entry:
        """Writes an entry in a build folder, checks it and moves it to its place by one rename.

        Raises:
            CompileError: what was written is not what should be.
            OSError: this folder cannot be written.
        """
        made = build_folder / "entry"
        made.mkdir(mode=0o755)
        for name, content in ((spec.artefact, artefact), (MANIFEST, manifest)):
            with open(os.open(made / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "wb") as file:
                file.write(content)
        try:
            check_entry(spec.key, (made / MANIFEST).read_bytes(), lambda name: (made / name).read_bytes())
        except BadEntry as bad:
            raise CompileError(spec.label, str(bad)) from None
        place = self.root / spec.arch / spec.key
        try:
            os.rename(made, place)
        except OSError as error:
            # A lock may not be visible to other hosts that share the folder: one of them was first.
            entry = self.load(spec) if error.errno in (errno.ENOTEMPTY, errno.EEXIST) else None
            if entry is None:
                raise
            return entry
        return Entry(place, spec, len(artefact))

    def _drop(self, folder: Path, bad: BadEntry) -> None:
        """Removes a bad entry, with a warning."""
        _logger.warning("dropped the compiled kernel at %s: %s", folder, bad)
        build_folder = _make_build_folder(folder.parent, folder.name)
        try:
            os.rename(folder, build_folder / "dropped")
        finally:
            remove_tree(build_folder)

    def clear(self) -> int:
        """Removes every entry and what failed or ended compiles left; returns how many entries there were.

        Raises:
            CacheError: the folder cannot be written to.
        """
        if not self.writable:
            raise CacheError(f"{self.root} cannot be written to")
        count = 0
        for arch_folder in self.root.glob("sm_*"):
            if arch_folder.is_symlink() or not arch_folder.is_dir():
                continue
            failed, builds = _children(arch_folder / "failed"), _children(arch_folder / "build")
            for folder in (*arch_folder.iterdir(), *failed, *builds):
                key = folder.name[:_KEY_LENGTH]
                if not _is_key(key):
                    continue
                lock = arch_folder / "locks" / f"{key}.lock"
                if folder.parent.name == "build" and (not _is_abandoned(folder) or is_locked(lock)):
                    continue
                remove_tree(folder)
                count += folder.parent == arch_folder and not os.path.lexists(folder)
        return count


def _make_build_folder(arch_folder: Path, key: str) -> Path:
    """Makes a private folder for the files of one compile; its name says the key and this host."""
    return Path(tempfile.mkdtemp(prefix=f"{key}-{_host()}-", dir=arch_folder / "build"))


def _is_abandoned(build_folder: Path) -> bool:
    """Whether the holder of its key's lock may remove a build folder.

    On this host the lock tells that nobody uses it. The lock may not be visible to other hosts that share the cache:
    their folders count as in use for as long as a compile may take.
    """
    if build_folder.name[_KEY_LENGTH:].startswith(f"-{_host()}-"):
        return True
    try:
        return time.time() - build_folder.lstat().st_mtime > LOCK_LIMIT_S
    except FileNotFoundError:
        return False


def _host() -> str:
    """A short hash of this host's name, for names of folders."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _children(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else []


def _is_key(name: str) -> bool:
    return len(name) == _KEY_LENGTH and set(name) <= set("0123456789abcdef")


def remove_tree(path: Path) -> None:
    """Removes a file, or a folder with its contents; a symbolic link is removed, not followed."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
