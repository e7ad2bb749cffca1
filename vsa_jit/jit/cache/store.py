"""A folder of entries: looking them up, compiling them, clearing them."""

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

from vsa_jit.jit.cache.entry import MANIFEST, BadEntry, Entry, Recipe, check_entry, manifest_of
from vsa_jit.jit.cache.lock import LOCK_LIMIT_S, is_locked, locked
from vsa_jit.jit.cache.permissions import make_folder, why_unsafe
from vsa_jit.jit.errors import CacheError, CompileError

_KEY_LENGTH = 64

_logger = logging.getLogger("vsa_jit")


class Store:
    """A folder of entries that only this user, or root, can write to.

    Attributes:
        writable: whether new entries can be made in it.
        kept: whether it outlives the process.
    """

    def __init__(self, root: Path, *, writable: bool, kept: bool) -> None:
        self.root = root
        self.writable = writable
        self.kept = kept

    def load(self, recipe: Recipe) -> Entry | None:
        """The entry of a recipe, checked, or None where there is none.

        Raises:
            BadEntry: there is one, and it is not what it should be.
        """
        folder = self.root / recipe.arch / recipe.key
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
            recipe, size = check_entry(folder.name, manifest, lambda name: (folder / name).read_bytes())
        except OSError as error:
            raise BadEntry(f"{error.strerror}: {error.filename}") from None
        if recipe.arch != folder.parent.name:
            raise BadEntry(f"it is for {recipe.arch}")
        return Entry(folder, recipe, size)

    def entries(self) -> Iterator[tuple[Path, Entry | BadEntry]]:
        """Every entry, or what is wrong with it."""
        for folder in sorted(self.root.glob("sm_*/*")):
            if _is_key(folder.name):
                try:
                    yield folder, self._check(folder)
                except BadEntry as error:
                    yield folder, error

    def build(self, recipe: Recipe, make: Callable[[Path], bytes], cancelled: threading.Event) -> Entry:
        """Compiles an entry, unless another process has done so meanwhile.

        Args:
            make: compiles in the private folder that it is given, and returns the artefact.
            cancelled: ends the wait for another process.

        Raises:
            CompileError: ``make`` raised it; its files are kept in the folder ``failed``.
            OSError: this folder cannot be written.
        """
        arch = self.root / recipe.arch
        for folder in (self.root, arch, arch / "locks", arch / "build"):
            make_folder(folder)
        with locked(arch / "locks" / f"{recipe.key}.lock", cancelled):
            try:
                entry = self.load(recipe)
            except BadEntry as bad:
                self._drop(arch / recipe.key, bad)
                entry = None
            return entry or self._compile(recipe, make)

    def _compile(self, recipe: Recipe, make: Callable[[Path], bytes]) -> Entry:
        arch = self.root / recipe.arch
        for private in (arch / "build").glob(f"{recipe.key}-*"):
            if _is_left(private):
                remove_tree(private)
        private = _make_private(arch, recipe.key)
        try:
            artefact = make(private)
            return self.publish(recipe, manifest_of(recipe, artefact).encode(), artefact, private)
        except CompileError as error:
            if error.folder is None:
                raise
            make_folder(arch / "failed")
            kept = arch / "failed" / recipe.key
            remove_tree(kept)
            os.rename(private, kept)
            raise error.moved_to(kept) from None
        finally:
            remove_tree(private)

    def publish(self, recipe: Recipe, manifest: bytes, artefact: bytes, private: Path) -> Entry:
        """Writes an entry in a private folder, checks it and moves it to its place.

        Raises:
            CompileError: what was written is not what should be.
            OSError: this folder cannot be written.
        """
        made = private / "entry"
        made.mkdir(mode=0o755)
        for name, content in ((recipe.artefact, artefact), (MANIFEST, manifest)):
            with open(os.open(made / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "wb") as file:
                file.write(content)
        try:
            check_entry(recipe.key, (made / MANIFEST).read_bytes(), lambda name: (made / name).read_bytes())
        except BadEntry as bad:
            raise CompileError(recipe.label, str(bad)) from None
        place = self.root / recipe.arch / recipe.key
        try:
            os.rename(made, place)
        except OSError as error:
            # Locks do not reach every host that shares a folder: another one was first.
            entry = self.load(recipe) if error.errno in (errno.ENOTEMPTY, errno.EEXIST) else None
            if entry is None:
                raise
            return entry
        return Entry(place, recipe, len(artefact))

    def _drop(self, folder: Path, bad: BadEntry) -> None:
        """Removes a bad entry, with a warning."""
        _logger.warning("dropped the compiled kernel at %s: %s", folder, bad)
        grave = _make_private(folder.parent, folder.name)
        try:
            os.rename(folder, grave / "dropped")
        finally:
            remove_tree(grave)

    def clear(self) -> int:
        """Removes every entry and what failed or ended compiles left; returns how many entries there were.

        Raises:
            CacheError: the folder cannot be written to.
        """
        if not self.writable:
            raise CacheError(f"{self.root} cannot be written to")
        count = 0
        for arch in self.root.glob("sm_*"):
            if arch.is_symlink() or not arch.is_dir():
                continue
            for folder in (*arch.iterdir(), *_children(arch / "failed"), *_children(arch / "build")):
                key = folder.name[:_KEY_LENGTH]
                if not _is_key(key):
                    continue
                is_build = folder.parent.name == "build"
                if is_build and (not _is_left(folder) or is_locked(arch / "locks" / f"{key}.lock")):
                    continue
                remove_tree(folder)
                count += folder.parent == arch and not os.path.lexists(folder)
        return count


def _make_private(arch: Path, key: str) -> Path:
    """A folder for the files of one compile on this host."""
    return Path(tempfile.mkdtemp(prefix=f"{key}-{_host()}-", dir=arch / "build"))


def _is_left(private: Path) -> bool:
    """Whether whoever holds the lock of its key may remove a private folder.

    Locks do not reach every host that shares a cache: what another one made may be in use as long as a compile lasts.
    """
    if private.name[_KEY_LENGTH:].startswith(f"-{_host()}-"):
        return True
    try:
        return time.time() - private.lstat().st_mtime > LOCK_LIMIT_S
    except FileNotFoundError:
        return False


def _host() -> str:
    """This host's name as part of a file's."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _children(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else []


def _is_key(name: str) -> bool:
    return len(name) == _KEY_LENGTH and set(name) <= set("0123456789abcdef")


def remove_tree(path: Path) -> None:
    """Removes a folder of ours; a link is removed, not followed."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
