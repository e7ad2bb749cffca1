"""Compiled kernels on disk: one folder for each GPU architecture, one entry for each key, checked on every load.

    <folder>/sm_90a/<key>/            an entry: the artefact and manifest.json
    <folder>/sm_90a/locks/<key>.lock  held by the process that compiles
    <folder>/sm_90a/build/<key>-*/    its private files
    <folder>/sm_90a/failed/<key>/     what is needed to see why a compile failed

An entry is made in the private folder, checked and moved to its place by one rename. The lock is the operating
system's and dies with its process. What a killed process leaves in ``build`` nobody reads, and the next compile of the
key removes it.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import logging
import os
import platform
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vsa_jit.jit.errors import CacheError, CompileError, SettingError

ENVIRONMENT_VARIABLE = "VSA_JIT_CACHE_DIR"
MANIFEST = "manifest.json"
FORMAT = 1
# Longer than a compile may take: who waits so long waits for a process that was stopped.
LOCK_LIMIT_S = 360.0
LOCK_POLL_S = 0.02
_KEY_LENGTH = 64
_OVERFLOW_USER = 65534
# A variable that names such a place was set wrong; any other failure is the machine's state, and no error.
_WRONG_PATH = (errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG)

_logger = logging.getLogger("vsa_jit")
# By process: a forked child makes its own.
_private_stores: dict[int, Store] = {}


@dataclass(frozen=True)
class Recipe:
    """All that determines an artefact, and nothing else: no path, no time."""

    label: str
    engine: str
    compiler: str
    arch: str
    flags: tuple[str, ...]
    source: str
    source_digest: str
    artefact: str

    @functools.cached_property
    def key(self) -> str:
        fields = {name: value for name, value in dataclasses.asdict(self).items() if name != "label"}
        return hashlib.sha256(json.dumps([FORMAT, fields], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Entry:
    """A checked entry."""

    folder: Path
    recipe: Recipe
    size: int

    @property
    def artefact(self) -> Path:
        return self.folder / self.recipe.artefact


class BadEntry(Exception):
    """What is wrong with an entry."""


class _NoHomeError(Exception):
    """Why there is no folder of the user's."""


def manifest_of(recipe: Recipe, artefact: bytes) -> str:
    record = {
        "format": FORMAT,
        "key": recipe.key,
        "recipe": dataclasses.asdict(recipe),
        "size": len(artefact),
        "sha256": hashlib.sha256(artefact).hexdigest(),
    }
    return json.dumps(record, indent=1)


def check_entry(key: str, manifest: bytes, artefact_of: Callable[[str], bytes]) -> tuple[Recipe, int]:
    """Checks an entry's contents: that they are whole, and those of this key.

    Args:
        artefact_of: reads the artefact by its name.

    Raises:
        BadEntry: they are not.
    """
    try:
        record = json.loads(manifest)
        fields = record["recipe"]
        flags = tuple(fields["flags"])
        texts = [*flags, *(value for name, value in fields.items() if name != "flags")]
        recipe = Recipe(**{**fields, "flags": flags})
        size, digest = record["size"], record["sha256"]
        said_format, said_key = record["format"], record["key"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise BadEntry(f"{MANIFEST} is not a manifest") from None
    if not all(isinstance(text, str) and text.isprintable() for text in texts):
        raise BadEntry("its recipe is not of printable text")
    if said_format != FORMAT:
        raise BadEntry(f"its format is {said_format!r}, not {FORMAT}")
    if not (said_key == key == recipe.key):
        raise BadEntry("it belongs to another key")
    if recipe.artefact not in ("kernel.cubin", "kernel.so"):
        raise BadEntry(f"{recipe.artefact!r} is no artefact's name")
    artefact = artefact_of(recipe.artefact)
    if len(artefact) != size or hashlib.sha256(artefact).hexdigest() != digest:
        raise BadEntry(f"{recipe.artefact} is not what was compiled")
    if not artefact.startswith(b"\x7fELF"):
        raise BadEntry(f"{recipe.artefact} is no compiled code")
    return recipe, size


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
        if not _exists(parent):
            continue
        status = os.stat(parent)
        if status.st_uid not in trusted:
            return f"{parent} belongs to user {status.st_uid}"
        by_group = status.st_mode & 0o020 and status.st_gid != own_group
        if not status.st_mode & stat.S_ISVTX and (status.st_mode & 0o002 or by_group):
            return f"{parent} can be written to by others (mode {stat.S_IMODE(status.st_mode):o})"
    return None


def _exists(path: Path) -> bool:
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
            _make_folder(folder)
        with _locked(arch / "locks" / f"{recipe.key}.lock", cancelled):
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
                _remove(private)
        private = _make_private(arch, recipe.key)
        try:
            artefact = make(private)
            return self.publish(recipe, manifest_of(recipe, artefact).encode(), artefact, private)
        except CompileError as error:
            if error.folder is None:
                raise
            _make_folder(arch / "failed")
            kept = arch / "failed" / recipe.key
            _remove(kept)
            os.rename(private, kept)
            raise error.moved_to(kept) from None
        finally:
            _remove(private)

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
            _remove(grave)

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
                if is_build and (not _is_left(folder) or _is_locked(arch / "locks" / f"{key}.lock")):
                    continue
                _remove(folder)
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


def _make_folder(folder: Path) -> None:
    """Makes a folder, with its parents, that others can read and only this user can write to, whatever the umask.

    Raises:
        OSError: it cannot be made, or it is there and somebody else could write to it.
    """
    for missing in reversed([parent for parent in folder.parents if not _exists(parent)]):
        missing.mkdir(mode=0o755, exist_ok=True)
    folder.mkdir(mode=0o755, exist_ok=True)
    unsafe = why_unsafe(folder)
    if unsafe is not None:
        raise PermissionError(errno.EPERM, unsafe, str(folder))


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


def open_store() -> Store:
    """The user's store, or, where that cannot be used, a private one that ends with the process.

    Raises:
        SettingError: VSA_JIT_CACHE_DIR names what cannot be a folder, or one that somebody else could write to.
        CacheError: nowhere can anything be written.
    """
    variables = (ENVIRONMENT_VARIABLE, "XDG_CACHE_HOME", "HOME")
    return _open_store(os.getpid(), *map(os.environ.get, variables))


# All that the answer depends on is an argument, so that it is looked for again when that changes.
@functools.cache
def _open_store(pid: int, named: str | None, xdg: str | None, home: str | None) -> Store:
    try:
        folder = user_folder()
    except _NoHomeError as error:
        return _fall_back(str(error))
    try:
        unsafe = why_unsafe(folder) if os.path.lexists(folder) else None
        # A link on the way is followed once, here.
        place = folder.resolve()
        existing = next(path for path in (place, *place.parents) if _exists(path))
        if unsafe is None and not existing.is_dir():
            unsafe = f"{existing} is not a folder"
        unsafe = unsafe or why_replaceable(place)
    except (OSError, RuntimeError) as error:
        unsafe = f"{folder} cannot be reached: {error}"
        # pathlib says of a loop of links that it is a RuntimeError.
        if getattr(error, "errno", errno.ELOOP) not in _WRONG_PATH:
            return _fall_back(unsafe)
    if unsafe is None:
        return Store(place, writable=os.access(existing, os.W_OK | os.X_OK), kept=True)
    if named:
        raise SettingError(f"{ENVIRONMENT_VARIABLE}: expected a folder that nobody else can write to, but {unsafe}")
    return _fall_back(unsafe)


def private_store() -> Store:
    """A store that ends with this process.

    Raises:
        CacheError: nowhere can anything be written.
    """
    pid = os.getpid()
    if pid in _private_stores:
        return _private_stores[pid]
    try:
        folder = Path(tempfile.mkdtemp(prefix="vsa_jit-"))
    except OSError as error:
        raise CacheError(f"no folder for compiled kernels: {error}") from None

    def remove() -> None:
        # Not in a forked child; and what an error has named stays.
        if os.getpid() == pid and not any(folder.glob("*/failed/*")):
            _remove(folder)

    atexit.register(remove)
    return _private_stores.setdefault(pid, Store(folder, writable=True, kept=False))


def _fall_back(reason: str) -> Store:
    warn_not_kept(reason)
    return private_store()


@functools.cache
def warn_not_kept(reason: str) -> None:
    _logger.warning(
        "compiled kernels are not kept for the next process: %s (%s names a folder to keep them in)",
        reason,
        ENVIRONMENT_VARIABLE,
    )


def find(recipe: Recipe) -> Entry | None:
    """The entry of a recipe, checked. A bad one counts as none, and is dropped when its key is compiled."""
    for store in _stores():
        try:
            entry = store.load(recipe)
        except BadEntry as bad:
            if not store.writable:
                _warn_bad(str(store.root / recipe.arch / recipe.key), str(bad))
            continue
        if entry is not None:
            return entry
    return None


@functools.cache
def _warn_bad(folder: str, bad: str) -> None:
    _logger.warning("the compiled kernel at %s is not used: %s", folder, bad)


@contextlib.contextmanager
def _locked(path: Path, cancelled: threading.Event) -> Iterator[None]:
    """Holds a lock that the kernel drops when the process ends, however it ends. The file stays where it is.

    Raises:
        OSError: the file system has no locks, or whoever holds this one does not go on, or the wait was cancelled.
    """
    # Only where kernels are compiled: not every system that runs the other backends has it.
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
            # Closing alone would leave it locked where another thread has forked meanwhile.
            fcntl.flock(file, fcntl.LOCK_UN)
    finally:
        os.close(file)


def _is_locked(path: Path) -> bool:
    """Whether some process holds a lock now."""
    cancelled = threading.Event()
    cancelled.set()
    try:
        with _locked(path, cancelled):
            return False
    except FileNotFoundError:
        return False
    except OSError:
        return True


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


def _stores() -> list[Store]:
    store = open_store()
    # A private store is made only when something must be written to it.
    private = _private_stores.get(os.getpid(), store)
    return [store] if private is store else [store, private]


def _is_key(name: str) -> bool:
    return len(name) == _KEY_LENGTH and set(name) <= set("0123456789abcdef")


def _remove(path: Path) -> None:
    """Removes a folder of ours; a link is removed, not followed."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
